"""What `serve` and `demo` share: the service's options, and an orderly end."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from serve.config import ServiceConfig, load_config


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which service to run."""
    parser.add_argument("--config", type=Path, help="YAML file of the service (default: the embedded model on the CPU)")
    parser.add_argument("--preset", help="model to serve, instead of the file's")
    parser.add_argument("--vae", help="VAE type that decodes, instead of the file's")
    parser.add_argument("--verbose", action="store_true", help="show the logs of all processes")


def read_service(args: argparse.Namespace, **overrides: Any) -> ServiceConfig:  # noqa: ANN401  (fields of any type)
    """Return the configuration that the options make.

    Raises:
        InvalidRequest: If the file or an option is not right.
    """
    given = {"preset": args.preset, "vae": args.vae, **overrides}
    return load_config(args.config, **{name: value for name, value in given.items() if value is not None})


@contextmanager
def ends_in_order() -> Iterator[None]:
    """Turn SIGTERM into the same interrupt as Ctrl-C, so that everything that was started is stopped."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
