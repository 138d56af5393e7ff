"""No test can reach anything but this machine."""

from __future__ import annotations

import os
import socket

import pytest

from tests.isolation import interfaces


def test_there_is_only_the_loopback_device() -> None:
    if os.environ["CAUSAL_FORCING_PRIVATE_NETWORK"] != "1":
        pytest.skip("a network namespace needs root on Linux")
    assert interfaces() == ["lo"]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
