"""`causal-forcing serve`: the service on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import sys
import threading

from serve.commands.running import add_service_arguments, ends_in_order, read_service
from serve.local import local_service


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `serve`."""
    add_service_arguments(parser)
    parser.add_argument("--grpc-port", type=int, help="port of the gRPC proxy, instead of the file's (9000)")
    parser.add_argument("--http-port", type=int, help="port of the HTTP proxy, instead of the file's (8000)")


def run(args: argparse.Namespace) -> int:
    """Run the service until an interrupt; return 0."""
    config = read_service(args, grpc_port=args.grpc_port, http_port=args.http_port)
    with ends_in_order():
        print(f"starting preset {config.preset} ({config.engine}) ...", file=sys.stderr)
        try:
            with local_service(config, verbose=args.verbose) as service:
                print(f"serving on {service.address}; try: causal-forcing stream --server {service.address}")
                print(f"metrics for Prometheus: {service.metrics_url}")
                sys.stdout.flush()
                threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    return 0
