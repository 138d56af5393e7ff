"""Prometheus beside a service on this machine: for `make observe`, and for tests."""
