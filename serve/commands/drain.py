"""`causal-forcing drain`: take this machine out of its cluster; its sessions end by themselves."""

from __future__ import annotations

import argparse
import os

from serve.deploy.draining import RayCluster, drain_node

EXIT_LEFT = 3
"""Not everything had ended in time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `drain`."""
    parser.add_argument("--timeout", type=float, default=3720, metavar="SECONDS", help="longest wait (default 3720)")
    parser.add_argument("--node-id", metavar="HEX", help="another node than this machine's")
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS", "auto"), help="of the cluster (default: $RAY_ADDRESS)"
    )


def run(args: argparse.Namespace) -> int:
    """Drain the node; return 0 when its replicas have ended, 3 if some had not in time.

    Raises:
        InvalidRequest: If there is no such cluster, or not just one node on this machine.
        Unavailable: If the cluster stops answering.
    """
    left = drain_node(RayCluster(args.address), args.timeout, args.node_id)
    print(f"{left} replicas were still there after {args.timeout:g} s" if left else "every replica has ended")
    return EXIT_LEFT if left else 0
