"""The embedded model through the whole service, against the same model in one process.

    python benchmarks/gateway_stream.py

Both use two CPU threads: in process two for every operation in turn, in the service one for the generator and one for
the decoder, which work at the same time. Frames a second are those of the steady part (from the 7th chunk on); the
service's are those that a client received. CPU time tells which process it went to.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import psutil
import torch
from _report import quantiles, write

from causal_forcing.engine import Engine
from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from serve.client import AsyncVideoClient, Frame, StreamOptions
from serve.config import load_config
from serve.local import free_port, local_service

WARM_UP_CHUNKS = 6
OPTIONS = StreamOptions("a red circle", seed=1, pacing="as_fast_as_possible")
FRAMES_PER_CHUNK = 4
TITLES = {
    "proxy": "ray::ProxyActor",
    "gateway": "ray::ServeReplica:causal-forcing:Gateway",
    "mailbox": "ray::_MailboxActor",
    "generator": "ray::ServeReplica:causal-forcing:Generator",
    "decoder": "ray::ServeReplica:causal-forcing:VaeDecoder",
    "raylet": "/raylet/raylet",
    "gcs": "/gcs/gcs_server",
}


def in_process(preset: str, vae: str, chunks: int) -> dict[str, float]:
    """Return TTFC and frames a second of a session in this process."""
    torch.set_num_threads(2)
    engine = Engine.load(preset, vae=vae)
    session = engine.new_session()
    start = time.perf_counter()
    session.update_prompt(PromptUpdate((WeightedPrompt("a red circle"),)))
    ready = []
    for _ in range(chunks):
        session.decode(session.generate_chunk())
        ready.append(time.perf_counter() - start)
    return {"ttfc_s": round(ready[0], 4), "fps": round(steady_fps(ready), 2)}


def steady_fps(ready: list[float]) -> float:
    """Return frames a second from the times at which chunks were complete."""
    steady = ready[WARM_UP_CHUNKS:]
    return FRAMES_PER_CHUNK * (len(steady) - 1) / (steady[-1] - steady[0])


async def served(address: str, chunks: int) -> tuple[list[float], list[Frame]]:
    """Return when each chunk was complete at a client, and each chunk's last frame."""
    ready, lasts = [], []
    async with (
        AsyncVideoClient(address) as client,
        client.stream(OPTIONS) as session,
    ):
        start = time.perf_counter()
        async for event in session:
            if isinstance(event, Frame) and event.last_in_chunk:
                ready.append(time.perf_counter() - start)
                lasts.append(event)
                if len(ready) == chunks:
                    break
    return ready, lasts


async def prompt_latencies(address: str, switches: int) -> list[float]:
    """Return the seconds from sending each prompt to its first frame."""
    latencies = []
    async with (
        AsyncVideoClient(address) as client,
        client.stream(OPTIONS) as session,
    ):
        waiting, sent, last = "", 0.0, 0
        async for event in session:
            if not isinstance(event, Frame):
                continue
            if event.prompt_id == waiting:
                latencies.append(time.perf_counter() - sent)
                waiting, last = "", event.chunk_index
            if not waiting and event.last_in_chunk and event.chunk_index >= last + 3:
                if len(latencies) == switches:
                    break
                sent = time.perf_counter()
                waiting = await session.update_prompt(f"prompt {len(latencies) % 2}")
    return latencies


def cpu_seconds() -> dict[str, float]:
    """Return the CPU time of each process of the service."""
    spent = dict.fromkeys(TITLES, 0.0)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        command = " ".join(process.info["cmdline"] or [])
        for name, title in TITLES.items():
            if title in command:
                spent[name] += sum(process.info["cpu_times"][:2])
    return spent


def through_the_service(preset: str, vae: str, chunks: int) -> dict[str, Any]:
    """Return what a client felt, and where the time went."""
    config = load_config(None, preset=preset, vae=vae, grpc_port=free_port(), http_port=free_port())
    start = time.perf_counter()
    with local_service(config) as service:
        started_s = time.perf_counter() - start
        first, _ = asyncio.run(served(service.address, 3))
        before = cpu_seconds()
        ready, lasts = asyncio.run(served(service.address, chunks))
        after = cpu_seconds()
        latencies = asyncio.run(prompt_latencies(service.address, 10))
    timings = [last.timings for last in lasts[WARM_UP_CHUNKS:] if last.timings is not None]
    return {
        "start_s": round(started_s, 1),
        "ttfc_first_session_s": round(first[0], 4),
        "ttfc_s": round(ready[0], 4),
        "fps": round(steady_fps(ready), 2),
        "chunk_interval_s": quantiles(
            [b - a for a, b in zip(ready[WARM_UP_CHUNKS:], ready[WARM_UP_CHUNKS + 1 :], strict=False)]
        ),
        "denoise_s": round(statistics.median(t.denoise_s for t in timings), 4),
        "decode_s": round(statistics.median(t.decode_s for t in timings), 4),
        "encode_s": round(statistics.median(t.encode_s for t in timings), 4),
        "prompt_latency_s": quantiles(latencies),
        "cpu_ms_per_chunk": {name: round(1e3 * (after[name] - before[name]) / chunks, 2) for name in TITLES},
    }


def main() -> None:
    """Measure both, in turns, and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="model (default tiny)")
    parser.add_argument("--vae", default="wan", help="VAE type (default wan)")
    parser.add_argument("--chunks", type=int, default=46, help="chunks of each session (default 46)")
    arguments = parser.parse_args()
    before = in_process(arguments.preset, arguments.vae, arguments.chunks)
    service = through_the_service(arguments.preset, arguments.vae, arguments.chunks)
    after = in_process(arguments.preset, arguments.vae, arguments.chunks)
    alone = statistics.mean([before["fps"], after["fps"]])
    result = {
        "preset": arguments.preset,
        "vae": arguments.vae,
        "in_process_before": before,
        "in_process_after": after,
        "service": service,
        "fps_ratio": round(service["fps"] / alone, 3),
        "ttfc_added_s": round(service["ttfc_s"] - statistics.mean([before["ttfc_s"], after["ttfc_s"]]), 4),
    }
    latency = service["prompt_latency_s"]
    name = f"{arguments.preset}, {arguments.vae}, through Ray Serve and gRPC"
    result["readme"] = [
        {"measure": f"{name}: FPS at the client", "value": f"{service['fps']} ({result['fps_ratio']} of in process)"},
        {"measure": f"{name}: TTFC", "value": f"{service['ttfc_s']} s"},
        {"measure": f"{name}: prompt latency, p50 / p99", "value": f"{latency['p50']} / {latency['p99']} s"},
    ]
    write(f"gateway_stream_{arguments.preset}_{arguments.vae}", result)


if __name__ == "__main__":
    main()
