"""`python -m serve.metrics`: write docs/metrics.md again (`--check`: fail when it is not current)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .document import render

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
"""The page, in a checkout."""


def main() -> int:
    """Write or check the page; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m serve.metrics", description="Write docs/metrics.md.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    if parser.parse_args().check:
        return 0 if DOCUMENT.read_text() == render() else 1
    DOCUMENT.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
