"""`causal-forcing parity DIR`: compare the engine with golden tensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from causal_forcing.commands.devices import DTYPES, choose_device
from causal_forcing.parity import format_table, numerics_of, run_parity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `parity`."""
    parser.add_argument("golden", type=Path, help="folder of golden .safetensors files")
    parser.add_argument("--device", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="what to compute in")


def run(args: argparse.Namespace) -> int:
    """Print a table of errors; return 1 if any comparison failed or could not be made."""
    device = choose_device(args.device or "cpu")
    checks = run_parity(args.golden, numerics_of(device, DTYPES[args.dtype]))
    print(format_table(checks))
    return 0 if checks and all(check.passed for check in checks) else 1
