"""`causal-forcing inspect FILE`: what a weight file holds, and whether it would load."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from causal_forcing.weights.inspection import Inspection, inspect_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`."""
    parser.add_argument("file", type=Path, help="weight file, or folder in the format of Diffusers")
    parser.add_argument("--entry", help="top-level entry of a training checkpoint, e.g. generator_ema")
    parser.add_argument("--check-values", action="store_true", help="also read every tensor and look for NaN")


def run(args: argparse.Namespace) -> int:
    """Print what was found; return 1 if the file would not load."""
    found = inspect_file(args.file, entry=args.entry, check_values=args.check_values)
    for name, value in _rows(found):
        print(f"{name:11} {value}")
    return 1 if found.problems else 0


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "file", str(found.path)
    optional = {
        "format": found.format,
        "model": f"{found.family} ({found.style} names)" if found.family else None,
        "entry": found.entry,
        "prefixes": ", ".join(found.prefixes),
        "sizes": str(found.config) if found.config else None,
        "presets": ", ".join(found.presets),
    }
    yield from ((name, value) for name, value in optional.items() if value)
    if found.tensor_count:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
        yield "tensors", f"{found.tensor_count} ({dtypes})"
        yield "parameters", f"{found.parameter_count / 1e6:,.1f} M, {found.size_bytes / 1e6:,.1f} MB"
    yield from ((f"({key})", value) for key, value in found.metadata.items())
    yield from (("PROBLEM", problem) for problem in found.problems)
    yield "loads", "no" if found.problems else "yes"
