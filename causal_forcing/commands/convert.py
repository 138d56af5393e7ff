"""`causal-forcing convert SOURCE [DESTINATION]`: any readable checkpoint as safetensors under our names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from causal_forcing.weights.convert import convert

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights can be converted to."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    parser.add_argument("source", type=Path, help="weight file, or folder in the format of Diffusers")
    parser.add_argument("destination", type=Path, nargs="?", help=".safetensors file (default: beside the source)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="convert the weights (default: keep)")
    parser.add_argument("--entry", help="top-level entry of a training checkpoint, e.g. generator_ema")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Write the file and print its path; return 0."""
    with tqdm(unit="B", unit_scale=True, disable=args.quiet, file=sys.stderr) as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        written = convert(
            args.source,
            args.destination,
            dtype=DTYPES.get(args.dtype),
            entry=args.entry,
            overwrite=args.overwrite,
            on_progress=show,
        )
    print(f"wrote {written}: {written.stat().st_size / 1e6:.1f} MB")
    return 0
