"""Runs the stages of the embedded model, one command for all of them.

    python -m causal_forcing.training.everything --device cuda --budget vae=70 --budget ar=130

On a CPU they run one after the other. On a GPU all start together: each prepares (scenes, captions, compilation) while
the stages it needs are still running, and begins when they have finished. The first that fails ends the others.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from causal_forcing.training.loop import DEFAULT_ROOT

STAGES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "vae": ("vae",),
    "latents": ("latents",),
    "lightvae": ("lightvae",),
    "ar": ("ar",),
    "guided": ("guided",),
    "cd": ("cd",),
    "cd-ar": ("cd", "--teacher", "ar"),
    "bidirectional": ("ar", "--bidirectional"),
    "cd-bidirectional": ("cd", "--teacher", "bidirectional"),
}
"""Module and options of each stage, in an order in which they can run."""

DEFAULT_STAGES = "text,vae,latents,lightvae,ar,guided,cd"
POLL_S = 0.5


def command(stage: str, arguments: argparse.Namespace) -> list[str]:
    """Return the command of a stage."""
    module, *options = STAGES[stage]
    words = [sys.executable, "-m", f"causal_forcing.training.{module}", *options, "--root", str(arguments.root)]
    if stage == "text":
        return words
    words += ["--device", arguments.device]
    for option, values in (("budget", arguments.budget), ("steps", arguments.steps)):
        if stage in values:
            words += [f"--{option}", values[stage]]
    for extra in arguments.option:
        name, _, option = extra.partition("=")
        words += option.split() if name == stage else []
    return words + (["--wait"] if arguments.device == "cuda" else [])


def run_in_turn(commands: Sequence[Sequence[str]]) -> int:
    """Run commands one after the other; return the status of the first that fails, or 0."""
    for words in commands:
        status = subprocess.run(words, check=False).returncode
        if status:
            return status
    return 0


def run_together(commands: Mapping[str, Sequence[str]]) -> int:
    """Run commands at the same time; the first that fails ends the others and gives the status."""
    started = time.monotonic()
    running = {stage: subprocess.Popen(words) for stage, words in commands.items()}
    try:
        while running:
            time.sleep(POLL_S)
            for stage, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                print(f"{time.monotonic() - started:6.1f} s  {stage} ended with {status}", flush=True)
                del running[stage]
                if status:
                    return status
        return 0
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def pairs(text: str) -> tuple[str, str]:
    """Return ``STAGE`` and ``VALUE`` of ``STAGE=VALUE``."""
    stage, sign, value = text.partition("=")
    if not sign or stage not in STAGES:
        raise argparse.ArgumentTypeError(f"{text!r} must be STAGE=VALUE with a stage of {', '.join(STAGES)}")
    return stage, value


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--stages", default=DEFAULT_STAGES, help="comma-separated (default: %(default)s)")
    for option, of in (("budget", "wall seconds"), ("steps", "updates")):
        parser.add_argument(f"--{option}", type=pairs, action="append", default=[], metavar="STAGE=N", help=of)
    parser.add_argument("--option", action="append", default=[], metavar="STAGE=WORDS", help="more options of a stage")
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}: must be of {', '.join(STAGES)}")
    arguments.budget, arguments.steps = dict(arguments.budget), dict(arguments.steps)
    commands = {stage: command(stage, arguments) for stage in stages}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments.device == "cpu":
        raise SystemExit(run_in_turn(list(commands.values())))
    if "text" in commands:  # takes seconds, and the others read what it writes
        run_in_turn([commands.pop("text")])
    raise SystemExit(run_together(commands))


if __name__ == "__main__":
    main()
