"""What holds of this engine on a CUDA device, and how fast it is there; every part by itself, within a time box.

    python benchmarks/gpu_check.py                          the first GPU, 1.3B with random weights at 480x832
    python benchmarks/gpu_check.py --sections parity,chunk  some parts
    python benchmarks/gpu_check.py --device cpu --preset tiny --size 64x64     a rehearsal without a GPU

A part that fails or takes too long is recorded and the others go on. `benchmarks/results/gpu_check.json` has, for each,
`passed`, `failed` (with the reason) or `skipped`; the exit status is 1 if one failed. Another device, preset or size
has a file of its own. No weights are needed: random ones of the true sizes take the same time and memory.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import gpu_correct
import gpu_speed
import torch
from _report import write
from gpu_bench import Bench, Failed, Skipped

from causal_forcing.presets import get_preset

SECTIONS: Mapping[str, tuple[Callable[[Bench], dict[str, Any]], int]] = {
    "ceilings": (gpu_speed.ceilings, 30),
    "parity": (gpu_correct.parity, 60),
    "oracles": (gpu_correct.oracles, 40),
    "syncs": (gpu_correct.syncs, 40),
    "cache_copies": (gpu_correct.cache_copies, 40),
    "memory": (gpu_correct.memory, 40),
    "attention": (gpu_speed.attention, 30),
    "chunk": (gpu_speed.chunk, 60),
    "decode": (gpu_speed.decode, 60),
    "stream": (gpu_speed.stream, 60),
    "compiled_cold": (gpu_speed.compiled_cold, 240),
    "compiled_warm": (gpu_speed.compiled_warm, 120),
    "cuda_graph": (gpu_speed.cuda_graph, 30),
    "prompt_switch": (gpu_speed.prompt_switch, 60),
    "fp8": (gpu_speed.fp8, 60),
    "text_encoder": (gpu_speed.text_encoder, 60),
}
"""Every part, with the most seconds that it may take, in the order of a run."""


RECORD = "gpu_check"
"""Name of the result file of a CUDA device with the default preset and size, whose numbers the README shows."""

PRESET, SIZE = "causal-forcing-framewise", "480x832"
"""What it is about."""


class OutOfTime(Exception):
    """A part took longer than its box."""


@dataclass
class Report:
    """What each part found.

    Attributes:
        path: Where it is written after every part, so that an interrupted run leaves what it has.
        settings: Of the run.
        sections: By name.
    """

    path: Path
    settings: dict[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Keep a part's outcome and print it."""
        self.sections[name] = entry
        print(f"[{time.strftime('%H:%M:%S')}] {name}: {json.dumps(entry)}", flush=True)
        self.path.write_text(json.dumps({"settings": self.settings, "sections": self.sections}, indent=2) + "\n")


@contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the enclosed work when it takes longer; a running kernel ends first."""

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTime(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(name: str, bench: Bench, seconds: float) -> dict[str, Any]:
    """Return the outcome of one part; nothing that it raises ends the run."""
    started = time.perf_counter()
    try:
        with time_box(seconds):
            outcome = {"status": "passed", "result": SECTIONS[name][0](bench)}
    except Skipped as reason:
        outcome = {"status": "skipped", "problem": str(reason)}
    except Failed as failure:
        outcome = {"status": "failed", "problem": str(failure), "result": failure.result}
    except Exception as error:  # noqa: BLE001 (a report of everything that can go wrong on an unknown machine)
        outcome = {"status": "failed", "problem": f"{type(error).__name__}: {error}"[:600], "where": _where(error)}
    finally:
        bench.clean()
    return {**outcome, "seconds": round(time.perf_counter() - started, 1)}


def _where(error: Exception) -> list[str]:
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)][-6:]


def result_name(device: str, preset: str, size: str) -> str:
    """Return what a result file is called unless a name is given; a rehearsal does not take the record's place."""
    kind = torch.device(device).type
    return RECORD if (kind, preset, size) == ("cuda", PRESET, SIZE) else f"{RECORD}_{preset}_{size}_{kind}"


def readme_rows(sections: Mapping[str, Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Return what the table says of those parts of a record that passed."""
    said: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "parity": lambda r: (
            f"float32 within {r['float32']['worst']}, bfloat16 within {r['bfloat16']['worst']} relative"
        ),
        "chunk": lambda r: f"{r['ms']['median']} ms eager, {r['tflops_per_s']} TFLOP/s",
        "stream": lambda r: f"{r['fps']} FPS with the Wan decoder, {r['denoise_fps']} without, TTFC {r['ttfc_ms']} ms",
        "compiled_warm": lambda r: (
            f"{r['chunk_ms']['median']} ms compiled; ready in {r['ready_s']} s from a warm cache"
        ),
    }
    return [
        {
            "measure": f"1.3B at {SIZE}, full window, on {device}: {name.replace('_', ' ')}",
            "value": say(s["result"]),
            "headline": name == "stream",
        }
        for name, say in said.items()
        if (s := sections.get(name)) is not None and s["status"] == "passed"
    ]


def main() -> int:
    """Run the parts and write the report; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--size", default=SIZE, help="HEIGHTxWIDTH")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated names")
    parser.add_argument("--budget", type=float, default=900, help="seconds for all parts together")
    parser.add_argument("--golden", type=Path, default=Path(__file__).parents[1] / "tests" / "golden")
    parser.add_argument("--partial", type=Path, default=Path("gpu_check.partial.json"), help="written after every part")
    parser.add_argument("--name", help=f"of the result file (default {RECORD}, and what differs from its settings)")
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split("x"))
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu-check: this machine has no CUDA device that torch can use (--device cpu rehearses)", file=sys.stderr)
        return 2
    bench = Bench(torch.device(arguments.device), get_preset(arguments.preset), height, width, arguments.golden)
    report = Report(arguments.partial, {**bench.describe(), "budget_s": arguments.budget})
    deadline = time.monotonic() + arguments.budget
    for name in arguments.sections.split(","):
        left = deadline - time.monotonic()
        if left < 5:
            report.add(name, {"status": "skipped", "problem": "the budget is spent"})
        else:
            report.add(name, run_section(name, bench, min(SECTIONS[name][1], left)))
    name = result_name(arguments.device, arguments.preset, arguments.size)
    rows = readme_rows(report.sections, bench.device_name) if name == RECORD else []
    write(arguments.name or name, {"settings": report.settings, "sections": report.sections, "readme": rows})
    report.path.unlink()
    failed = [name for name, entry in report.sections.items() if entry["status"] == "failed"]
    print(f"gpu-check: {len(report.sections)} parts, {len(failed)} failed {' '.join(failed)}".rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
