"""`python -m serve.observe` (`make observe`): the service, Prometheus and viewers on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path
from urllib.parse import urlsplit

from causal_forcing.errors import CausalForcingError
from serve.commands.running import add_service_arguments, ends_in_order, read_service
from serve.local import free_port, local_service
from serve.metrics.client import client_metrics

from .load import watch
from .prometheus import prometheus

INTERVAL_S = 5
"""Between two scrapes."""


def main() -> int:
    """Run until an interrupt; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m serve.observe", description=__doc__)
    add_service_arguments(parser)
    parser.add_argument("--viewers", type=int, default=3, help="sessions that are asked for at a time (default 3)")
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus (default 9090)")
    parser.add_argument("--lan", action="store_true", help="let other machines ask Prometheus")
    parser.add_argument("--folder", type=Path, default=Path(".observe"), help="for its data (default .observe)")
    args = parser.parse_args()
    with ends_in_order():
        try:
            _run(args)
        except CausalForcingError as error:
            print(f"observe: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace) -> None:
    config = read_service(args)
    port = free_port()
    print(f"starting preset {config.preset} ({config.engine}) ...", file=sys.stderr)
    with local_service(config, verbose=args.verbose) as service, client_metrics(port) as recorder:
        targets = {"causal-forcing": urlsplit(service.metrics_url).netloc, "clients": f"127.0.0.1:{port}"}
        with prometheus(targets, args.folder, port=args.port, interval_s=INTERVAL_S, lan=args.lan) as running:
            print(f"Prometheus: {running.url}/graph; alerts: {running.url}/alerts")
            print("dashboards for a Grafana that reads it: k8s/monitoring/dashboards (docs/observability.md)")
            sys.stdout.flush()
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(watch(service.address, recorder, args.viewers))


if __name__ == "__main__":
    sys.exit(main())
