"""`causal-forcing download PRESET`: fetch and verify the weights of a preset."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from causal_forcing.errors import InvalidRequest
from causal_forcing.presets import PRESETS, get_preset
from causal_forcing.weights.download import DEFAULT_PARTS, DownloadPlan, Progress, download
from causal_forcing.weights.locate import WEIGHTS_DIR_VARIABLE, default_weights_dir


class _PlanShown(Exception):
    """Raised to stop before the first byte."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `download`."""
    parser.add_argument("preset", help=f"one of {', '.join(name for name, p in PRESETS.items() if not p.embedded)}")
    parser.add_argument(
        "--weights-dir", type=Path, help=f"where to (default: ${WEIGHTS_DIR_VARIABLE}, or {default_weights_dir()})"
    )
    parser.add_argument(
        "--part", action="append", metavar="PART", help=f"fetch only these (default: {', '.join(DEFAULT_PARTS)})"
    )
    parser.add_argument("--revision", action="append", metavar="REPO=COMMIT", help="commit to take of a repository")
    parser.add_argument("--allow-unpinned", action="store_true", help="also fetch files whose contents are not pinned")
    parser.add_argument("--offline", action="store_true", help="only verify what is there (as HF_HUB_OFFLINE=1 does)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Announce, fetch and verify the files; return 0."""
    preset = get_preset(args.preset)
    bars = _Bars(quiet=args.quiet)
    print(f"preset {preset.name}: {preset.summary}; licence of the generator: {preset.licence}")

    def announce(plan: DownloadPlan) -> None:
        for file in plan.files:
            size = "size unknown" if file.file.size_bytes is None else f"{file.file.size_bytes / 1e9:.2f} GB"
            state = "there" if file.present else "to fetch"
            print(f"  {file.part}: {file.file.repo}/{file.file.path} ({size}, {file.file.licence}), {state}")
        print(f"{plan.missing_bytes / 1e9:.2f} GB to fetch")
        if args.dry_run:
            raise _PlanShown

    try:
        files = download(
            preset,
            args.weights_dir,
            parts=args.part or DEFAULT_PARTS,
            revisions=_parse_revisions(args.revision or ()),
            allow_unpinned=args.allow_unpinned,
            offline=args.offline,
            on_plan=announce,
            on_progress=bars.show,
        )
    except _PlanShown:
        return 0
    finally:
        bars.close()
    print(f"{len(files)} files verified in {args.weights_dir or default_weights_dir()}")
    return 0


class _Bars:
    """One progress bar at a time: a file being fetched, then verified."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[None] | None = None
        self._of: tuple[str, str] | None = None

    def show(self, progress: Progress) -> None:
        """Draw how far a file is."""
        if self._of != (progress.part, progress.phase):
            self.close()
            self._of = (progress.part, progress.phase)
            self._bar = tqdm(
                total=progress.total_bytes,
                initial=progress.done_bytes,
                unit="B",
                unit_scale=True,
                desc=f"{progress.phase} {progress.part}",
                disable=self._quiet,
                file=sys.stderr,
            )
        elif self._bar is not None:
            self._bar.update(progress.done_bytes - self._bar.n)

    def close(self) -> None:
        """Finish the bar that is shown, if any."""
        if self._bar is not None:
            self._bar.close()


def _parse_revisions(texts: list[str] | tuple[()]) -> dict[str, str]:
    revisions: dict[str, str] = {}
    for text in texts:
        repo, mark, commit = text.partition("=")
        if not (mark and repo and commit):
            raise InvalidRequest("revision", text, "must be REPO=COMMIT, as in owner/name=0123abcd...")
        revisions[repo] = commit
    return revisions
