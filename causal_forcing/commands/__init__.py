"""Subcommands of `causal-forcing` that run in this process; each module has `add_arguments` and `run`."""
