"""What it costs to take a session up again, and how close the result is, on the embedded model.

    python benchmarks/restore.py [--chunks 120] [--anchor-every 30]

A session runs, with its record kept, and is continued four ways: from a snapshot, from the record `fast`, from the
record `exact`, and `exact` from the last anchor. Each says how long it took, in chunk times, how many bytes were kept,
and how far the next chunk's latents are from those of the session that was never interrupted. The anchors' own price is
the extra time of the chunks that begin with one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _report import paused_training, write

from causal_forcing.engine import Engine
from causal_forcing.prompts import PromptUpdate, SwitchPolicy, WeightedPrompt
from causal_forcing.record import RestoreMode, SessionRecord
from causal_forcing.session import Session


def run(engine: Engine, chunks: int, anchor_every: int | None) -> tuple[Session, SessionRecord, list[float]]:
    """Return a session after that many chunks with a switch half-way, its record, and the seconds of each chunk."""
    session = engine.new_session(engine.session_config(anchor_every_chunks=anchor_every))
    record = SessionRecord(engine.preset.name, session.config)
    seconds = []
    for index in range(chunks):
        if index in (0, chunks // 2):
            text = f"scene {index}"
            session.update_prompt(PromptUpdate((WeightedPrompt(text),), policy=SwitchPolicy.RECACHE, prompt_id=text))
        started = time.perf_counter()
        chunk = session.generate_chunk()
        seconds.append(time.perf_counter() - started)
        record.append(chunk, session.state.prompt.update)
    return session, record, seconds


def compare(session: Session, restore: Callable[[], Session], nbytes: int, chunk_s: float) -> dict[str, Any]:
    """Return the cost of a restore and the distance of its next chunk; the session itself is left where it was."""
    before = session.snapshot()
    wanted = session.generate_chunk().latents
    session.restore(before)
    started = time.perf_counter()
    restored = restore()
    seconds = time.perf_counter() - started
    error = (restored.generate_chunk().latents - wanted).abs().max()
    return {
        "seconds": round(seconds, 4),
        "chunk_times": round(seconds / chunk_s, 2),
        "kept_bytes": nbytes,
        "max_difference_of_next_latents": float(error),
    }


def measure(engine: Engine, chunks: int, anchor_every: int) -> dict[str, Any]:
    """Return every way of continuing, without and with anchors."""
    session, record, seconds = run(engine, chunks, None)
    chunk_s = statistics.median(seconds[engine.preset.window_frames or 0 :])
    snapshot = session.snapshot()

    def from_snapshot() -> Session:
        fresh = engine.new_session(session.config)
        fresh.restore(snapshot)
        return fresh

    anchored, anchored_record, anchored_seconds = run(engine, chunks, anchor_every)
    hitches = anchored_seconds[anchor_every::anchor_every]
    restore = {mode: lambda mode=mode: record.restore(engine, mode) for mode in RestoreMode}
    ways = {
        "snapshot": compare(session, from_snapshot, snapshot.nbytes, chunk_s),
        "fast": compare(session, restore[RestoreMode.FAST], record.nbytes, chunk_s),
        "exact": compare(session, restore[RestoreMode.EXACT], record.nbytes, chunk_s),
        "exact_from_anchor": compare(
            anchored, lambda: anchored_record.restore(engine, RestoreMode.EXACT), anchored_record.nbytes, chunk_s
        ),
    }
    return {
        "median_chunk_ms": round(1000 * chunk_s, 2),
        "anchor_hitch_chunk_times": round(statistics.median(hitches) / chunk_s - 1, 2),
        "ways": ways,
    }


def readme_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Return what the table says."""
    rows = [
        {
            "measure": f"take up a session after {result['chunks']} chunks: {name.replace('_', ' ')}",
            "value": (
                f"{way['chunk_times']} chunk times, {way['kept_bytes'] / 1e6:.2f} MB kept, "
                f"next latents differ by {way['max_difference_of_next_latents']:.1e}"
            ),
        }
        for name, way in result["ways"].items()
    ]
    hitch = f"{result['anchor_hitch_chunk_times']} chunk times"
    return [*rows, {"measure": "an anchor's hitch (window 21)", "value": hitch}]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--anchor-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with paused_training() as paused:
        result = measure(Engine.load("tiny", vae=None), arguments.chunks, arguments.anchor_every)
    result |= {"chunks": arguments.chunks, "anchor_every_chunks": arguments.anchor_every, "training_paused": paused}
    write("restore", {"settings": {"threads": arguments.threads}, **result, "readme": readme_rows(result)})


if __name__ == "__main__":
    main()
