"""What the client's commands share: which service, who asks, and how a refusal is told."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import grpc

from causal_forcing.errors import InvalidRequest
from serve.client import VideoClient, VideoServiceError

API_KEY_VARIABLE = "CAUSAL_FORCING_API_KEY"
"""Environment variable with the key or token that the service asks for, if it does; an option would show in `ps`."""

EXIT_FAILED = 1


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the service is."""
    parser.add_argument(
        "--server",
        default="127.0.0.1:9000",
        metavar="HOST:PORT",
        help=f"(default 127.0.0.1:9000); ${API_KEY_VARIABLE} is the key or token to show there, if it wants one",
    )
    parser.add_argument("--tls", action="store_true", help="connect with TLS, as this machine trusts it")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="connect with TLS; the authority to trust, as PEM")


def connect(args: argparse.Namespace) -> VideoClient:
    """Return a client of the service that the options name.

    Raises:
        InvalidRequest: If a file cannot be read.
    """
    key = os.environ.get(API_KEY_VARIABLE)
    metadata = [("authorization", f"Bearer {key}")] if key else []
    return VideoClient(args.server, credentials=_credentials(args), metadata=metadata)


def failed(command: str, error: VideoServiceError) -> int:
    """Tell of a service's error; return the exit status."""
    print(f"causal-forcing {command}: {error}", file=sys.stderr)
    return EXIT_FAILED


def _credentials(args: argparse.Namespace) -> grpc.ChannelCredentials | None:
    if args.tls_ca is None:
        return grpc.ssl_channel_credentials() if args.tls else None
    try:
        return grpc.ssl_channel_credentials(args.tls_ca.read_bytes())
    except OSError as error:
        raise InvalidRequest("tls_ca", str(args.tls_ca), f"cannot be read ({error.strerror})") from error
