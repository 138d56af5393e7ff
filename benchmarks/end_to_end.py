"""How fast the embedded model makes video in one process, by VAE type.

    python benchmarks/end_to_end.py [--vae wan,lightvae] [--chunks 60]
    python benchmarks/end_to_end.py --cpu-time      one thread, by its processor time, on a busy machine

Always three numbers: frames a second of the transformer alone, of transformer and VAE, and the time to the first chunk
(TTFC), with a full window. Frames a second over 16 is the real-time factor. A matrix multiplication is timed between
the chunks; its speed says how much of the machine the run had.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _report import paused_training, spread, write

from causal_forcing.engine import Engine
from causal_forcing.geometry import FRAMES_PER_SECOND, TEMPORAL_STRIDE
from causal_forcing.presets import get_preset
from causal_forcing.prompts import PromptUpdate, WeightedPrompt

MATRIX = 1024


def measure(vae: str, chunks: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the speed of the embedded model with one VAE, its window full."""
    engine = Engine.load("tiny", vae=vae)
    fill = (engine.preset.window_frames or 0) // engine.preset.chunk_frames
    _first_chunk_s(engine, 0, clock)  # warms up
    first_s = [_first_chunk_s(engine, number, clock) for number in range(1, 6)]
    session = engine.new_session()
    session.update_prompt(_prompt(6))
    matrix = torch.randn(MATRIX, MATRIX)
    denoise_s, decode_s, matmul_s = [], [], []
    for index in range(fill + chunks):
        started = clock()
        chunk = session.generate_chunk()
        denoised = clock()
        session.decode(chunk)
        decoded = clock()
        matrix @ matrix
        if index >= fill:
            denoise_s.append(denoised - started)
            decode_s.append(decoded - denoised)
            matmul_s.append(clock() - decoded)
    frames = TEMPORAL_STRIDE * engine.preset.chunk_frames
    whole_s = [a + b for a, b in zip(denoise_s, decode_s, strict=True)]
    fps = frames / statistics.median(whole_s)
    return {
        "vae": vae,
        "ttfc_ms": spread([1000 * s for s in first_s]),
        "denoise_ms": spread([1000 * s for s in denoise_s]),
        "decode_ms": spread([1000 * s for s in decode_s]),
        "denoise_fps": round(frames / statistics.median(denoise_s), 1),
        "fps": round(fps, 1),
        "real_time_factor": round(fps / FRAMES_PER_SECOND, 2),
        "matmul_gflops_per_s": round(2 * MATRIX**3 / statistics.median(matmul_s) / 1e9, 1),
    }


def _prompt(number: int) -> PromptUpdate:
    """Return a prompt that the text encoder has not seen."""
    return PromptUpdate((WeightedPrompt(f"{number} red circles move to the left over a white background"),))


def _first_chunk_s(engine: Engine, number: int, clock: Callable[[], float]) -> float:
    """Return the seconds from a new prompt to the pixels of the first chunk of a new session."""
    started = clock()
    session = engine.new_session()
    session.update_prompt(_prompt(number))
    session.decode(session.generate_chunk())
    return clock() - started


def readme_rows(results: list[dict[str, Any]], *, cpu_time: bool) -> list[dict[str, Any]]:
    """Return what the table says."""
    how = ", processor time of one thread" if cpu_time else ""
    return [
        {
            "measure": f"embedded model in process at 64x64, `{r['vae']}`{how}",
            "value": (
                f"{r['fps']} FPS ({r['real_time_factor']} x real time; {r['denoise_fps']} FPS without decoding), "
                f"TTFC {r['ttfc_ms']['median']} ms, at {r['matmul_gflops_per_s']} GFLOP/s of matmul"
            ),
            "headline": r["vae"] == "wan" and not cpu_time,
        }
        for r in results
    ]


def main() -> None:
    """Run every VAE type and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default=",".join(get_preset("tiny").vaes), help="comma-separated VAE types")
    parser.add_argument("--chunks", type=int, default=60, help="measured, after the window has filled")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, timed by its processor time")
    arguments = parser.parse_args()
    threads = 1 if arguments.cpu_time else arguments.threads
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    with paused_training() as paused:
        results = [measure(vae, arguments.chunks, clock) for vae in arguments.vae.split(",")]
    settings = {
        "threads": threads,
        "clock": "processor time" if arguments.cpu_time else "wall",
        "torch": torch.__version__,
        "training_paused": paused,
    }
    rows = readme_rows(results, cpu_time=arguments.cpu_time)
    write("end_to_end", {"settings": settings, "vaes": results, "readme": rows})


if __name__ == "__main__":
    main()
