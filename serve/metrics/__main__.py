"""`python -m serve.metrics`: write docs/metrics.md and the dashboards again (`--check`: say what is not current)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import document, grafana
from .dashboards import DASHBOARDS

ROOT = Path(__file__).parents[2]
"""Of a checkout."""


def files() -> dict[Path, str]:
    """Return everything that is made of the tables here: text by path."""
    folder = ROOT / "k8s/monitoring/dashboards"
    drawn = {folder / f"{dashboard.name}.json": grafana.render(dashboard) for dashboard in DASHBOARDS}
    return {ROOT / "docs/metrics.md": document.render(), **drawn}


def main() -> int:
    """Write or check the files; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.metrics", description="Write docs/metrics.md and dashboards."
    )
    parser.add_argument("--check", action="store_true", help="only say which files are not current")
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    if not parser.parse_args().check:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files()[path])
        return 0
    print("".join(f"{path} is not current\n" for path in stale), end="")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
