"""Fills the tables of numbers in docs/benchmarks.md and the README from benchmarks/results/*.json.

    python benchmarks/readme.py [--check]

A result file that has numbers for people holds them under ``readme``: a list of ``{"measure": ..., "value": ...}``,
beside the ``commit``, ``command`` and ``hardware`` that every result has. Rows with ``"headline": true``, the few that
a newcomer asks for, are in the README as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- numbers: written by make readme-numbers -->"
END = "<!-- end of numbers -->"


def render(results: Path, *, headlines_only: bool, folder: str) -> str:
    """Return the table of what result files have for people, as Markdown.

    Args:
        results: Folder of the files.
        headlines_only: Whether to leave out rows that are no headlines.
        folder: The same folder as the document's links name it.
    """
    rows = ["| measured | value | commit | on |", "|---|---|---|---|"]
    for path in sorted(results.glob("*.json")):
        document: dict[str, Any] = json.loads(path.read_text())
        for row in document.get("readme", ()):
            if row.get("headline") or not headlines_only:
                where = f"{document['hardware']['cpus']} cores, {document['hardware']['machine']}"
                source = f"[{document['commit']}]({folder}/{path.name})"
                rows.append(f"| {row['measure']} | {row['value']} | {source} | {where} |")
    return "\n".join(rows) if len(rows) > 2 else "No results yet: run `make bench`."


def insert(document: str, table: str) -> str:
    """Return a document with the table between its two marks.

    Raises:
        ValueError: A mark is missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    """Write both documents, or with ``--check`` return 1 if that would change one."""
    results = ROOT / "benchmarks" / "results"
    tables = {
        ROOT / "README.md": render(results, headlines_only=True, folder="benchmarks/results"),
        ROOT / "docs" / "benchmarks.md": render(results, headlines_only=False, folder="../benchmarks/results"),
    }
    written = {path: insert(path.read_text(), table) for path, table in tables.items()}
    if "--check" in sys.argv:
        return int(any(path.read_text() != text for path, text in written.items()))
    for path, text in written.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
