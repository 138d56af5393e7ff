"""The parts of gpu_check.py that ask how fast something is.

What is measured follows the public suites for streaming video: cadence of a single client (P1), latency and jitter
(P2), frames a second split by what is counted (P3), and what a prompt switch costs (P4).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _report import spread
from gpu_bench import Bench, Failed, Skipped, percentiles
from torch.nn.attention import SDPBackend, sdpa_kernel

from causal_forcing.geometry import FRAMES_PER_SECOND, TEMPORAL_STRIDE
from causal_forcing.prompts import SwitchPolicy
from causal_forcing.weights.quantise import FP8, quantise

CHUNKS = 40
WARM_UP_CHUNKS = 6
"""Of a cadence run, left out of its statistics together with the last one (after vLLM-Omni's benchmark)."""

BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def ceilings(bench: Bench) -> dict[str, Any]:
    """Measure what the device can do at most: a large matrix product, and a large copy."""
    size = 8192 if bench.is_cuda else 512
    a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    product = bench.time_ms(lambda: a @ b, repeats=20, warm_ups=5)
    source = torch.empty(2**30 if bench.is_cuda else 2**22, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = bench.time_ms(lambda: target.copy_(source), repeats=20, warm_ups=5)
    bench.notes["tflops"] = 2 * size**3 / product["median"] / 1e9
    return {
        "matmul_tflops_per_s": round(bench.notes["tflops"], 1),
        "copy_gb_per_s": round(2 * source.nbytes / copy["median"] / 1e6, 1),
    }


def _attending(backend: SDPBackend | None) -> AbstractContextManager[Any]:
    return nullcontext() if backend is None else sdpa_kernel(backend)


def attention(bench: Bench) -> dict[str, Any]:
    """Time the attention of a chunk to a full window by each of torch's backends."""
    c, tokens = bench.preset.transformer, bench.new_tokens
    rows = bench.preset.window_frames * tokens // bench.preset.chunk_frames
    q = torch.randn(1, c.num_heads, tokens, c.head_dim, device=bench.device, dtype=bench.dtype)
    k, v = (torch.randn(1, c.num_heads, rows, c.head_dim, device=bench.device, dtype=bench.dtype) for _ in range(2))
    flops = 4 * tokens * rows * c.dim
    expected = F.scaled_dot_product_attention(q, k, v)
    result: dict[str, Any] = {"queries": tokens, "keys": rows}
    for name, backend in BACKENDS.items():
        try:
            with _attending(backend):
                difference = float((F.scaled_dot_product_attention(q, k, v) - expected).float().abs().max())
                times = bench.time_ms(lambda: F.scaled_dot_product_attention(q, k, v), repeats=20, warm_ups=5)
        except RuntimeError as error:
            result[name] = {"unavailable": str(error)[:200]}
            continue
        result[name] = {
            "ms": times["median"],
            "tflops_per_s": round(flops / times["median"] / 1e9, 1),
            "max_difference_from_default": difference,
        }
    available = {name: found["ms"] for name, found in result.items() if isinstance(found, dict) and "ms" in found}
    bench.notes["attention"] = result["fastest"] = min(available, key=available.__getitem__)
    return result


def chunk(bench: Bench) -> dict[str, Any]:
    """Time a chunk on a full window, eager: until the device is done, and until the host has queued it."""
    session = bench.full_session()
    times = bench.time_ms(session.generate_chunk, repeats=12)
    queued = []
    for _ in range(8):
        bench.wait()
        started = time.perf_counter()
        session.generate_chunk()
        queued.append(1000 * (time.perf_counter() - started))
    steps = len(session.config.denoising_steps)
    flops = (steps + 1) * bench.forward_flops(session.config.cache_frames)
    frames = TEMPORAL_STRIDE * bench.preset.chunk_frames
    result: dict[str, Any] = {
        "ms": times,
        "queued_by_host_ms": spread(queued),
        "tflop": round(flops / 1e12, 3),
        "tflops_per_s": round(flops / times["median"] / 1e9, 1),
        "denoise_fps": round(1000 * frames / times["median"], 2),
    }
    if "tflops" in bench.notes:
        result["fraction_of_matmul"] = round(flops / times["median"] / 1e9 / bench.notes["tflops"], 3)
    for name, backend in BACKENDS.items():
        if backend is not None and bench.is_cuda and name in ("flash", "cudnn"):
            with _attending(backend):
                result[f"ms_with_{name}"] = bench.time_ms(session.generate_chunk, repeats=8)
    first = bench.new_session()
    first.generate_chunk()
    result["second_chunk_ms"] = bench.time_ms(first.generate_chunk, repeats=1, warm_ups=0)["median"]
    return result


def decode(bench: Bench) -> dict[str, Any]:
    """Time the decoding of one latent frame by every VAE of the preset, in mid-stream."""
    config = bench.new_session().config
    latent = torch.randn(config.geometry.latent_shape(1), device=bench.device, dtype=bench.dtype)
    result: dict[str, Any] = {}
    for name in bench.preset.vaes:
        vae = bench.engine.vae if name == "wan" else bench.vae(name)
        state = vae.new_decoder_state(config.geometry)
        first = bench.time_ms(lambda vae=vae, state=state: vae.decode(latent, state), repeats=1, warm_ups=0)
        times = bench.time_ms(lambda vae=vae, state=state: vae.decode(latent, state), repeats=8)
        result[name] = {"first_ms": first["median"], "ms": times, "state_bytes": state.nbytes}
    return result


def stream(bench: Bench) -> dict[str, Any]:
    """Generate and decode as a single client would see it (P1 to P3), each chunk waited for."""
    frames = TEMPORAL_STRIDE * bench.preset.chunk_frames
    warm = bench.new_session()
    warm.decode(warm.generate_chunk())
    bench.wait()
    started = time.perf_counter()
    session = bench.new_session()
    session.decode(session.generate_chunk())
    bench.wait()
    ready, denoise = [time.perf_counter()], []
    ttfc_ms = round(1000 * (ready[0] - started), 1)
    for _ in range(CHUNKS - 1):
        begun = time.perf_counter()
        made = session.generate_chunk()
        bench.wait()
        denoise.append(1000 * (time.perf_counter() - begun))
        session.decode(made)
        bench.wait()
        ready.append(time.perf_counter())
    gaps = [1000 * (b - a) for a, b in pairwise(ready)][WARM_UP_CHUNKS:-1]
    full = session.config.cache_frames // bench.preset.chunk_frames
    steady = [1000 * (b - a) for a, b in pairwise(ready)][full:]
    allowed_ms = 1000 * frames / FRAMES_PER_SECOND
    jitter = [abs(b - a) for a, b in pairwise(gaps)]
    fps = 1000 * frames / (sum(steady) / len(steady))
    return {
        "chunks": CHUNKS,
        "window_full_after_chunk": full,
        "ttfc_ms": ttfc_ms,
        "chunk_gap_ms": percentiles(gaps),
        "jitter_ms": percentiles(jitter),
        "deadline_16fps_attained": round(sum(g <= allowed_ms for g in gaps) / len(gaps), 4),
        "underruns_of_viewer": _underruns(ready, allowed_ms / 1000),
        "denoise_fps": round(1000 * frames * len(denoise[full:]) / sum(denoise[full:]), 2),
        "fps": round(fps, 2),
        "real_time_factor": round(fps / FRAMES_PER_SECOND, 2),
    }


def _underruns(ready: list[float], chunk_s: float) -> int:
    """Return how often a viewer who starts at the second chunk, and shows each for its time, has to wait."""
    shown, count = ready[1], 0
    for at in ready[2:]:
        shown += chunk_s
        if at > shown:
            count, shown = count + 1, at
    return count


def prompt_switch(bench: Bench) -> dict[str, Any]:
    """Time the first frame under a new prompt (P4), by policy, with a full window and nothing queued."""
    session = bench.full_session()
    plain = bench.time_ms(lambda: session.decode(session.generate_chunk()), repeats=4)["median"]
    result: dict[str, Any] = {"chunk_and_decode_ms": plain}
    for policy in SwitchPolicy:
        for _ in range(session.config.cache_frames // bench.preset.chunk_frames):  # what the last one forgot
            session.generate_chunk()
        prepared = bench.prompt(policy, policy)
        session.decode(session.generate_chunk())
        bench.wait()
        started = time.perf_counter()
        session.update_prompt(*prepared)
        session.decode(session.generate_chunk())
        bench.wait()
        taken = 1000 * (time.perf_counter() - started)
        result[policy] = {"first_frame_ms": round(taken, 1), "beyond_a_chunk_ms": round(taken - plain, 1)}
    return result


def cuda_graph(bench: Bench) -> dict[str, Any]:
    """Capture a denoising pass on a full window, and check that its replay equals the eager pass, bit for bit."""
    bench.need_cuda()
    session = bench.full_session()
    transformer, modulation = bench.engine.transformer, session._schedule.steps[0].modulation
    with torch.inference_mode():
        latents = torch.randn(session.config.geometry.latent_shape(bench.preset.chunk_frames), device=bench.device)
        latents = latents.to(bench.dtype)
        context = session._open_chunk(bench.preset.chunk_frames)
        eager = transformer(latents, modulation, context).clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            transformer(latents, modulation, context)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = transformer(latents, modulation, context)
        graph.replay()
        bench.wait()
        result = {
            "equal_to_eager": bool(torch.equal(captured, eager)),
            "eager_pass_ms": bench.time_ms(lambda: transformer(latents, modulation, context)),
            "replayed_pass_ms": bench.time_ms(graph.replay),
        }
    if not result["equal_to_eager"]:
        raise Failed("a replay differs from the eager pass", result)
    return result


def text_encoder(bench: Bench) -> dict[str, Any]:
    """Time one prompt of 64 tokens through a random text encoder of the preset's size."""
    from causal_forcing.text_encoder import build_encoder, encode_ids

    config = bench.preset.text_encoder
    encoder = build_encoder(config, "meta")
    bench.fill(encoder)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    length = min(64, config.text_len)
    ids = torch.randint(3, config.vocab_size, (1, length), device=bench.device)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        times = bench.time_ms(lambda: encode_ids(encoder, ids, mask, config.text_len), repeats=5)
    return {"weights_bytes": sum(p.nbytes for p in encoder.parameters()), "tokens": length, "ms": times}


def fp8(bench: Bench) -> dict[str, Any]:
    """Compare chunks with the blocks' linear layers in fp8 with those in bfloat16: distance, and time."""
    bench.need_cuda()
    if importlib.util.find_spec("torchao") is None:
        raise Skipped("torchao is not installed: pip install --constraint constraints.txt torchao")
    plain = bench.new_session()
    expected = plain.generate_chunk().latents.float()
    whole = bench.full_session()
    before = bench.time_ms(whole.generate_chunk, repeats=6)
    del bench.engine, plain, whole  # its weights are joined, and would be read instead of the quantised ones
    bench.clean()
    engine = bench.unjoined_engine()
    quantise(engine.transformer, FP8)
    bench.__dict__["engine"] = engine
    try:
        ours = bench.new_session().generate_chunk().latents.float()
        session = bench.full_session()
        times = bench.time_ms(session.generate_chunk, repeats=6)
        finite = bool(session.generate_chunk().is_finite)
    finally:
        del bench.engine
    error = float((ours - expected).norm() / expected.norm())
    result = {"ms": times, "bfloat16_ms": before, "relative_error_of_first_chunk": round(error, 4), "finite": finite}
    if not finite or not error < 0.5:
        raise Failed("fp8 computes something else", result)
    return result


def compiled_cold(bench: Bench) -> dict[str, Any]:
    """Start an engine in a new process and compile it, with nothing in the cache of compiled code."""
    bench.notes["compile_cache"] = tempfile.mkdtemp(prefix="compiled-")
    return _cold_start(bench, bench.notes["compile_cache"])


def compiled_warm(bench: Bench) -> dict[str, Any]:
    """Start an engine in a new process and compile it, with the cache that the cold start left."""
    if "compile_cache" not in bench.notes:
        raise Skipped("compiled_cold did not run")
    return _cold_start(bench, bench.notes["compile_cache"])


def _cold_start(bench: Bench, cache: str) -> dict[str, Any]:
    script = Path(__file__).with_name("gpu_cold_start.py")
    command = [sys.executable, str(script), "--device", str(bench.device), "--preset", bench.preset.name]
    command += ["--size", f"{bench.height}x{bench.width}", "--cache", cache]
    if bench.notes.get("attention") not in (None, "default"):
        command += ["--attention", bench.notes["attention"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate()
    finally:
        process.kill()  # when the time box ends this part
    if process.returncode:
        raise Failed(f"the process ended with {process.returncode}: {errors[-1500:]}", {})
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result
