"""One session through the whole service, against the same engine in one process.

    python benchmarks/serve_stream.py --engine tiny        # the embedded model; everything shares this machine's cores
    python benchmarks/serve_stream.py --engine tiny --vae lightvae
    python benchmarks/serve_stream.py --engine simulated   # 101 ms a chunk asleep, 4 JPEGs of 60 kB

What is measured, with the protocols of other systems: cadence (after a warm-up session, the steady part without the
first six chunks and the last: intervals, attainment of the frame rate, a viewer with a buffer), deadline misses and
jitter, frames a second split into generator, generator and decoder, and client, time to the first chunk, and prompt
switches at several amounts of credit W. `tiny` computes in two threads in process; in the service one for the generator
and one for the decoder. CPU shares say where the rest goes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

from _report import write
from _service import Usage, configured, hot_spots, load, processes, running
from _stats import WARM_UP_CHUNKS, intervals, jitter, miss_rate, percentiles, rate, viewer

from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from serve.config import ServiceConfig

PROMPT = PromptUpdate((WeightedPrompt("a red circle"),))
CHUNK_S, FRAME_BYTES = 0.101, 60_000
"""The generator's floor on an H100 (4 steps, 1.3 billion parameters), and a JPEG of 480x832."""

DEADLINE_S = 4 / 16
"""A chunk's media time at 16 frames a second."""


def configuration(engine: str, vae: str) -> ServiceConfig:
    """Return the service that is measured; the simulated one has no VAE."""
    if engine == "tiny":
        return configured(preset="tiny", vae=vae)
    return configured(
        engine="simulated",
        preset="causal-forcing-framewise",
        simulated={"chunk_ms": 1000 * CHUNK_S, "frame_bytes": FRAME_BYTES, "picture_px": 16},
    )


def in_process(engine: str, config: ServiceConfig, chunks: int) -> dict[str, float]:
    """Return frames a second with and without decoding, and the time to the first chunk, in this process."""
    made, decoded = (_simulated if engine == "simulated" else _tiny)(config, chunks)
    denoised = [0.0]
    for before, after in zip([0.0, *decoded], made, strict=False):
        denoised.append(denoised[-1] + after - before)
    return {
        "denoise_fps": round(rate(denoised[1:], 4), 2),
        "fps": round(rate(decoded, 4), 2),
        "ttfc_s": round(decoded[0], 4),
    }


def _tiny(config: ServiceConfig, chunks: int) -> tuple[list[float], list[float]]:
    """Return when each chunk's latents and its frames were ready."""
    import torch

    from causal_forcing.engine import Engine

    torch.set_num_threads(2)
    engine = Engine.load(config.preset, vae=config.vae)
    warm = engine.new_session()
    warm.update_prompt(PROMPT)
    for _ in range(2):
        warm.decode(warm.generate_chunk())
    made, decoded = [], []
    start = time.perf_counter()
    session = engine.new_session()
    session.update_prompt(PROMPT)
    for _ in range(chunks):
        chunk = session.generate_chunk()
        made.append(time.perf_counter() - start)
        session.decode(chunk)
        decoded.append(time.perf_counter() - start)
    return made, decoded


def _simulated(config: ServiceConfig, chunks: int) -> tuple[list[float], list[float]]:
    from serve.codecs.frames import FrameFormat, new_encoder
    from serve.simulated import SimulatedDecoder, SimulatedGenerator

    session_config = config.model_preset.session_config()
    generator, decoder = SimulatedGenerator(config).open(session_config), SimulatedDecoder(config)
    stream = decoder.open(session_config.height, session_config.width)
    encoder = new_encoder(FrameFormat(), session_config.height, session_config.width, decoder.min_frame_bytes)
    made, decoded = [], []
    start = time.perf_counter()
    generator.update_prompt(PROMPT, [])
    for _ in range(chunks):
        chunk = generator.generate(lambda: False)
        assert chunk is not None
        made.append(time.perf_counter() - start)
        for number, pixels in enumerate(stream.decode(chunk.latents)):
            encoder.encode(pixels, number, keyframe=False)
        decoded.append(time.perf_counter() - start)
    return made, decoded


def cadence(session: dict[str, Any]) -> dict[str, Any]:
    """Return what a client felt of a session that ran as fast as it could."""
    chunk_s = session["chunk_s"]
    spans = intervals(chunk_s)
    chunk = statistics.median(spans)
    return {
        "fps": round(rate(chunk_s, 4), 2),
        "chunk_interval_s": percentiles(spans),
        "jitter_s": jitter(spans),
        "video_real_time_factor": round(chunk / DEADLINE_S, 3),
        "attainment_of_16_fps": round(1 - miss_rate(spans, DEADLINE_S), 4),
        "miss_rate_of_1.5_medians": miss_rate(spans, 1.5 * chunk),
        "viewer_at_16_fps": [viewer(chunk_s, DEADLINE_S, buffered) for buffered in (1, 2, 4)],
        "denoise_s": round(statistics.median(session["denoise_s"][WARM_UP_CHUNKS:]), 4),
        "decode_s": round(statistics.median(session["decode_s"][WARM_UP_CHUNKS:]), 4),
        "encode_s": round(statistics.median(session["encode_s"][WARM_UP_CHUNKS:]), 4),
    }


def switching(session: dict[str, Any], chunk_s: float, decode_s: float) -> dict[str, Any]:
    """Return prompt latencies as the client saw them, and from the gateway's receipt.

    A receipt cannot be seen from outside; it is taken to be half a ping's round trip after the sending.
    """
    half_ping_s = statistics.median(session["round_trip_s"]) / 2
    latencies = [switch["shown_s"] - switch["sent_s"] for switch in session["switches"]]
    received = [latency - half_ping_s for latency in latencies]
    goals = {"p50": 1.5 * chunk_s + decode_s + 0.05, "p99": 2 * chunk_s + decode_s + 0.05}
    return {
        "switches": len(latencies),
        "from_sending_s": percentiles(latencies),
        "from_receipt_s": percentiles(received),
        "half_ping_s": round(half_ping_s, 4),
        "goal_s": {name: round(value, 4) for name, value in goals.items()},
        "chunks_of_the_old_prompt": percentiles([s["chunks_behind"] for s in session["switches"]]),
    }


async def measure(address: str, arguments: argparse.Namespace, chunk_s: float | None) -> dict[str, Any]:
    """Run the viewers against a running service."""
    cold = await load(address, chunks=3)
    short = await load(address, chunks=1, repeat=arguments.sessions)
    opened = [s["chunk_s"][0] - s["opened_s"] for s in short["sessions"]]
    until_started = [s["started_s"] - s["opened_s"] for s in short["sessions"]]
    usage = Usage()
    streamed = await load(address, chunks=arguments.chunks)
    shares, box = usage.shares(), usage.box()
    felt = cadence(streamed["sessions"][0])
    chunk = chunk_s or felt["denoise_s"]
    switched = {}
    for credit, switches in ((2, arguments.switches), (1, arguments.switches // 3), (3, arguments.switches // 3)):
        options = {"switches": switches, "switch_phase_s": chunk, "credit": credit, "ping": 1}
        watched = await load(address, **options)
        switched[f"W={credit}"] = switching(watched["sessions"][0], chunk, felt["decode_s"])
    result = {
        "ttfc_of_the_first_session_s": round(cold["sessions"][0]["chunk_s"][0] - cold["sessions"][0]["opened_s"], 4),
        "ttfc_s": percentiles(opened),
        "of_it_until_started_s": percentiles(until_started),
        "cadence": felt,
        "prompt_switch": switched,
        "cpu_share_of_a_core": shares,
        "box_in_use": box,
        "client_cpu_share": streamed["client_cpu_share"],
    }
    if arguments.profile:
        result["hot_spots"] = await profiled(address, arguments.profile)
    return result


async def profiled(address: str, part: str) -> list[dict[str, Any]]:
    """Return where a part of the service spends its time under four sessions."""
    watching = asyncio.create_task(load(address, sessions=4, chunks=100_000, seconds=12))
    await asyncio.sleep(3)
    found = await asyncio.to_thread(hot_spots, processes()[part][0])
    await watching
    return found


def lines(name: str, result: dict[str, Any], *, headline: bool) -> list[dict[str, Any]]:
    """Return the table's lines; those that a newcomer asks for go to the README as headlines, if any do."""
    served, alone = result["service"], result["in_process"]
    felt, switch = served["cadence"], served["prompt_switch"]["W=2"]
    name += ", one session through the service"
    goal = switch["goal_s"]
    return [
        {
            "measure": f"{name}: FPS at the client",
            "value": f"{felt['fps']} ({result['fps_ratio']} of in process; "
            f"there {alone['denoise_fps']} without decoding)",
            "headline": headline,
        },
        {
            "measure": f"{name}: chunk interval, p50 / p99",
            "value": f"{1e3 * felt['chunk_interval_s']['p50']:.0f} / {1e3 * felt['chunk_interval_s']['p99']:.0f} ms",
        },
        {
            "measure": f"{name}: TTFC",
            "value": f"{1e3 * served['ttfc_s']['p50']:.0f} ms ({1e3 * result['ttfc_added_s']:.0f} ms added by serving)",
            "headline": headline,
        },
        {
            "measure": f"{name}: prompt latency from the gateway's receipt, p50 / p99",
            "value": f"{1e3 * switch['from_receipt_s']['p50']:.0f} / {1e3 * switch['from_receipt_s']['p99']:.0f} ms "
            f"(goal {1e3 * goal['p50']:.0f} / {1e3 * goal['p99']:.0f})",
            "headline": headline,
        },
    ]


def main() -> None:
    """Measure in process, through the service, and in process again; store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("tiny", "simulated"), default="simulated", help="what to serve")
    parser.add_argument("--vae", choices=("wan", "lightvae"), default="wan", help="decoder of tiny (default wan)")
    parser.add_argument("--chunks", type=int, default=160, help="chunks of the long session (default 160)")
    parser.add_argument("--sessions", type=int, default=20, help="short sessions for the TTFC (default 20)")
    parser.add_argument("--switches", type=int, default=40, help="prompt switches at W=2 (default 40)")
    parser.add_argument("--profile", help="also show where this part of the service spends its time (gateway, ...)")
    arguments = parser.parse_args()
    simulated = arguments.engine == "simulated"
    if simulated and arguments.vae != "wan":
        parser.error("--vae: the simulated engine has none")
    config = configuration(arguments.engine, arguments.vae)
    rounds = [in_process(arguments.engine, config, 46)]
    with running(config) as (address, start_s):
        fixed = CHUNK_S if simulated else None
        served = asyncio.run(measure(address, arguments, fixed))
    rounds.append(in_process(arguments.engine, config, 46))
    alone = {name: round(statistics.mean(r[name] for r in rounds), 4) for name in rounds[0]}
    result = {
        "engine": arguments.engine,
        "in_process_rounds": rounds,
        "in_process": alone,
        "service_start_s": start_s,
        "service": served,
        "fps_ratio": round(served["cadence"]["fps"] / alone["fps"], 3),
        "ttfc_added_s": round(served["ttfc_s"]["p50"] - alone["ttfc_s"], 4),
    }
    result["readme"] = lines(
        "simulated accelerator (101 ms a chunk)" if simulated else f"tiny, {arguments.vae}",
        result,
        headline=not simulated and arguments.vae == "wan",
    )
    write(f"serve_stream_{arguments.engine}" + ("" if arguments.vae == "wan" else f"_{arguments.vae}"), result)


if __name__ == "__main__":
    main()
