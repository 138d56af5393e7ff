"""Fills the README's table of numbers from benchmarks/results/*.json.

    python benchmarks/readme.py [--check]

A result file that has numbers for the README holds them under ``readme``: a list of ``{"measure": ..., "value": ...}``,
beside the ``commit``, ``command`` and ``hardware`` that every result has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- numbers: written by make readme-numbers -->"
END = "<!-- end of numbers -->"


def render(results: Path) -> str:
    """Return the table of every result file that has numbers for the README, as Markdown."""
    rows = ["| measured | value | commit | on |", "|---|---|---|---|"]
    for path in sorted(results.glob("*.json")):
        document: dict[str, Any] = json.loads(path.read_text())
        for row in document.get("readme", ()):
            where = f"{document['hardware']['cpus']} cores, {document['hardware']['machine']}"
            source = f"[{document['commit']}](benchmarks/results/{path.name})"
            rows.append(f"| {row['measure']} | {row['value']} | {source} | {where} |")
    return "\n".join(rows) if len(rows) > 2 else "No results yet: run `make bench`."


def insert(readme: str, table: str) -> str:
    """Return the README with the table between its two marks.

    Raises:
        ValueError: A mark is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    """Write the README, or with ``--check`` return 1 if that would change it."""
    path = ROOT / "README.md"
    before = path.read_text()
    after = insert(before, render(ROOT / "benchmarks" / "results"))
    if "--check" in sys.argv:
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
