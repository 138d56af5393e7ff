"""The parts of gpu_check.py that ask whether something holds: parity, no waiting, no copies of the cache, memory."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from gpu_bench import Bench, Failed
from torch.profiler import ProfilerActivity, profile, record_function

from causal_forcing.engine import Engine
from causal_forcing.errors import OutOfMemory
from causal_forcing.kv_cache import LayerMemory
from causal_forcing.parity import Check, numerics_of, run_parity
from causal_forcing.presets import get_preset
from causal_forcing.session import Session
from causal_forcing.transformer import TransformerBlock
from causal_forcing.weights.memory import required_bytes

_CHUNK = "one chunk"


def parity(bench: Bench) -> dict[str, Any]:
    """Compare the golden runs on the device: float32 as strictly as on a CPU, bfloat16 by relative error."""
    result: dict[str, Any] = {}
    with _no_tf32():
        for dtype in (torch.float32, torch.bfloat16):
            checks = run_parity(bench.golden, numerics_of(bench.device, dtype))
            result[str(dtype).removeprefix("torch.")] = _summary(checks)
    failed = [f"{dtype} {name}" for dtype, summary in result.items() for name in summary["failed"]]
    if failed:
        raise Failed(f"{len(failed)} comparisons: {', '.join(failed[:5])}", result)
    return result


def _summary(checks: list[Check]) -> dict[str, Any]:
    worst: dict[str, float] = {}
    for check in checks:
        kind = check.file.partition("_")[0]
        worst[kind] = float(f"{max(check.error, worst.get(kind, 0.0)):.2e}")
    return {
        "comparisons": len(checks),
        "failed": [f"{c.file} {c.name} {c.problem or f'{c.error:.2e}'}" for c in checks if not c.passed],
        "worst": max(worst.values()),
        "worst_by_kind": worst,
        "tolerances": sorted({c.tolerance for c in checks}),
    }


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Compute float32 as float32; convolutions round to 10 bits otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def syncs(bench: Bench) -> dict[str, Any]:
    """Check that a chunk never waits for the device: by torch's own switch, and by what the profiler sees."""
    bench.need_cuda()
    session = bench.full_session()
    with _syncs_raise():
        session.generate_chunk()
    if not _planted_sync_raises(session):
        raise Failed("a planted .item() was not noticed, so the check says nothing", {})
    calls, kernels = _profile(session)
    waits = {name: n for name, n in calls.items() if "Synchronize" in name or name == "cudaMemcpy"}
    pageable = {name: n for name, n in kernels.items() if "Pageable" in name}
    launches = sum(n for name, n in calls.items() if "LaunchKernel" in name)
    result = {
        "waits": waits,
        "pageable_copies": pageable,
        "copies": {name: n for name, n in kernels.items() if name.startswith("Memcpy")},
        "kernel_launches": launches,
    }
    if waits or pageable:
        raise Failed(f"the host waits: {waits | pageable}", result)
    return result


@contextmanager
def _syncs_raise() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _planted_sync_raises(session: Session) -> bool:
    original = TransformerBlock._norm

    def waiting(self: TransformerBlock, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x.sum().item()
        return original(self, x, shift, scale)

    with patch.object(TransformerBlock, "_norm", waiting), _syncs_raise():
        try:
            session.generate_chunk()
        except RuntimeError:
            return True
    return False


def _profile(session: Session) -> tuple[Counter[str], Counter[str]]:
    """Return the runtime calls that the host made during a chunk, and what the device then ran, by name."""
    session.generate_chunk()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled, record_function(_CHUNK):
        session.generate_chunk()
    events = profiled.events() or []
    chunk = next(e for e in events if e.name == _CHUNK and e.device_type == torch.autograd.DeviceType.CPU)
    on_host, on_device = Counter[str](), Counter[str]()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            on_device[event.name] += 1
        elif chunk.time_range.start <= event.time_range.start <= chunk.time_range.end and event.name.startswith("cu"):
            on_host[event.name] += 1
    return on_host, on_device


def oracles(bench: Bench) -> dict[str, Any]:
    """Check what must be equal bit for bit, with the embedded model, and that a device too small is refused."""
    engine = Engine.load("tiny", device=bench.device, text_encoder=False)
    alone, other, third = (_TinyStream(bench, engine, seed) for seed in (1, 2, 1))
    expected = [alone() for _ in range(30)]
    interleaved = []
    for _ in range(30):
        interleaved.append(third())
        other()
    session = third.session
    snapshot = session.snapshot()
    onward = [third() for _ in range(5)]
    session.restore(snapshot)
    again = [third() for _ in range(5)]
    session.reset()
    session.update_prompt(*bench.tiny_prompt(engine))
    fresh = [third() for _ in range(30)]
    on_cpu = Engine.load("tiny", device="cpu", text_encoder=False)
    exact = Engine.load("tiny", device=bench.device, dtype=torch.float32, text_encoder=False)
    with _no_tf32():
        theirs, ours = (_TinyStream(bench, e, 1) for e in (on_cpu, exact))
        apart = [float((ours()[0].cpu() - theirs()[0]).abs().max()) for _ in range(30)]
    result: dict[str, Any] = {
        "isolated": _equal(interleaved, expected),
        "restored": _equal(again, onward),
        "reset_is_fresh": _equal(fresh, expected),
        "refuses_what_does_not_fit": _refuses(bench),
        "float32_from_cpu": max(apart),
    }
    wrong = [name for name, holds in result.items() if holds is False]
    if wrong or not result["float32_from_cpu"] < 1e-2:
        raise Failed(f"does not hold: {wrong or 'float32'}", result)
    return result


class _TinyStream:
    """Latents and pixels of one session's next chunk, call by call."""

    def __init__(self, bench: Bench, engine: Engine, seed: int) -> None:
        self.session = engine.new_session(engine.session_config(seed=seed))
        self.session.update_prompt(*bench.tiny_prompt(engine))

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        chunk = self.session.generate_chunk()
        return chunk.latents, self.session.decode(chunk)


def _equal(ours: list[tuple[torch.Tensor, ...]], theirs: list[tuple[torch.Tensor, ...]]) -> bool:
    return all(
        torch.equal(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


def _refuses(bench: Bench) -> bool:
    preset = get_preset("causal-forcing-framewise")
    try:
        Engine.load(preset, device=bench.device, session=preset.session_config(height=8192, width=8192))
    except OutOfMemory as error:
        return "is needed" in error.message
    return False


def cache_copies(bench: Bench) -> dict[str, Any]:
    """Check that a chunk writes its own rows of the cache, and copies, computes from or rewrites no others."""
    bench.need_cuda()
    meters = _load_meters()
    session = bench.full_session()
    cache, steps = session.state.cache, len(session.config.denoising_steps)
    meter, flops = meters.CacheMeter(cache), meters.FlopMeter()
    with flops, meter:
        session.generate_chunk()
    config = bench.preset.transformer
    needed = config.num_layers * 2 * (steps + 1) * bench.new_tokens
    result = {
        "rows_written": meter.rows_written,
        "rows_needed": needed,
        "copies": meter.copies,
        "tflop": round(flops.total / 1e12, 4),
    }
    original = LayerMemory.read
    planted = meters.CacheMeter(cache)
    with patch.object(LayerMemory, "read", lambda self, plan: tuple(t.clone() for t in original(self, plan))), planted:
        session.generate_chunk()
    if not planted.copies:
        raise Failed("a planted copy was not noticed, so the check says nothing", result)
    if meter.copies or meter.rows_written != needed:
        raise Failed("rows of the cache were copied, or not written once a pass", result)
    return result


def _load_meters() -> ModuleType:
    """Return the module of meters that the tests count with, by its path: `tests` may be another package here."""
    spec = importlib.util.spec_from_file_location("meters", Path(__file__).parents[1] / "tests" / "counting.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory(bench: Bench) -> dict[str, Any]:
    """Compare the peak of chunk and decode with the arithmetic that `Engine.load` refuses devices by."""
    bench.need_cuda()
    engine = bench.engine
    bench.clean()
    before = torch.cuda.memory_allocated(bench.device)
    session = bench.full_session()
    session.decode(session.generate_chunk())
    bench.wait()
    state = torch.cuda.memory_allocated(bench.device) - before
    torch.cuda.reset_peak_memory_stats(bench.device)
    chunk = session.generate_chunk()
    bench.wait()
    peak_of_chunk = torch.cuda.max_memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    session.decode(chunk)
    bench.wait()
    peak_of_decode = torch.cuda.max_memory_allocated(bench.device)
    peak = max(peak_of_chunk, peak_of_decode)
    plan = required_bytes(bench.preset, "wan", session.config, bench.dtype, text_encoder=False)
    weights = sum(p.nbytes for m in (engine.transformer, engine.vae) for p in m.parameters())  # type: ignore[union-attr]
    result = {
        "weights_bytes": weights,
        "allocated_before_session_bytes": before,
        "session_nbytes": session.nbytes,
        "session_nbytes_by_part": session.state.nbytes_by_part(),
        "allocated_by_session_bytes": state,
        "peak_of_chunk_bytes": peak_of_chunk,
        "peak_of_decode_bytes": peak_of_decode,
        "planned_bytes": plan.total_bytes,
        "plan": str(plan),
        "peak_over_plan": round(peak / plan.total_bytes, 4),
    }
    if peak > 1.05 * plan.total_bytes:
        raise Failed(f"the peak is {peak / plan.total_bytes:.3f} times the plan", result)
    return result
