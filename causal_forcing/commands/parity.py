"""`causal-forcing parity DIR`: compare the engine with golden tensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from causal_forcing.parity import format_table, run_parity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `parity`."""
    parser.add_argument("golden", type=Path, help="folder of golden .safetensors files")


def run(args: argparse.Namespace) -> int:
    """Print a table of maximum absolute errors; return 1 if any comparison failed or could not be made."""
    checks = run_parity(args.golden)
    print(format_table(checks))
    return 0 if checks and all(check.passed for check in checks) else 1
