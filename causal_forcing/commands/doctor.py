"""`causal-forcing doctor`: what this machine can run, and what it lacks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from causal_forcing.arithmetic import chunk_flops, decode_flops
from causal_forcing.commands.devices import choose_device
from causal_forcing.compile import compile_cache_dir, require_compiler
from causal_forcing.engine import Engine
from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.geometry import pixel_frames
from causal_forcing.presets import PRESETS, Preset
from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from causal_forcing.startup import PROGRAM_STARTED_S, StartUp
from causal_forcing.weights.loading import default_dtype
from causal_forcing.weights.locate import default_weights_dir, find_part
from causal_forcing.weights.memory import free_bytes, required_bytes

_MATRIX = {"cpu": 1024, "cuda": 8192}
_OPTIONAL = {"av": "media", "ray": "server", "torchao": "fp8"}
"""Modules that a part of the program needs, and the extra that brings them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--weights-dir", type=Path, help="folder of downloaded weights")
    parser.add_argument("--json", action="store_true", help="print a document for programs instead")


def run(args: argparse.Namespace) -> int:
    """Print what was found; return 1 if nothing can run here."""
    startup = StartUp()
    startup.add("import", time.perf_counter() - PROGRAM_STARTED_S)
    device = choose_device(args.device)
    found = examine(device, args.weights_dir or default_weights_dir())
    found["cold_start_s"] = cold_start(device, startup)
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0 if any(preset["fits"] and not preset["missing"] for preset in found["presets"]) else 1


def examine(device: torch.device, weights_dir: Path) -> dict[str, Any]:
    """Return everything that is found, as plain values.

    Args:
        device: To run on.
        weights_dir: Where weights are looked for.
    """
    flops_per_s = matmul_flops_per_s(device)
    existing = next(path for path in (weights_dir, *weights_dir.absolute().parents) if path.exists())
    return {
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()},
        "device": _device(device) | {"matmul_tflops_per_s": round(flops_per_s / 1e12, 3)},
        "free_memory_bytes": free_bytes(device),
        "weights_dir": str(weights_dir),
        "free_disk_bytes": shutil.disk_usage(existing).free,
        "compile_cache": str(compile_cache_dir()),
        "compile_problem": _compile_problem(device),
        "modules": {name: importlib.util.find_spec(name) is not None for name in _OPTIONAL},
        "presets": [_examine_preset(preset, device, weights_dir, flops_per_s) for preset in PRESETS.values()],
    }


def cold_start(device: torch.device, startup: StartUp) -> dict[str, float]:
    """Return the seconds of each phase until the embedded model has made its first chunk here."""
    engine = Engine.load("tiny", device=device, startup=startup)
    with startup.phase("first chunk"):
        session = engine.new_session()
        session.update_prompt(PromptUpdate((WeightedPrompt("a red circle"),)))
        session.decode(session.generate_chunk())
        _wait(device)
    return {name: round(seconds, 3) for name, seconds in startup.phases.items()}


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None if `nvidia-smi` is missing or has no answer."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def matmul_flops_per_s(device: torch.device) -> float:
    """Return the speed of a large matrix product, the best of five: a second's work at most."""
    size = _MATRIX[device.type]
    matrix = torch.randn(size, size, device=device, dtype=default_dtype(device))
    best_s = float("inf")
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * size**3 / best_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"kind": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def _examine_preset(preset: Preset, device: torch.device, weights_dir: Path, flops_per_s: float) -> dict[str, Any]:
    config = preset.session_config()
    plan = required_bytes(preset, "wan", config, default_dtype(device))
    flops = chunk_flops(preset.transformer, config, preset.chunk_frames)
    decode = preset.chunk_frames * decode_flops(preset.vae_config("wan"), preset.height, preset.width)
    frames = pixel_frames(preset.chunk_frames, first=False)
    missing = [] if preset.embedded else _missing_parts(preset, weights_dir)
    return {
        "name": preset.name,
        "needs_bytes": plan.needed_bytes,
        "arithmetic": str(plan),
        "fits": plan.needed_bytes <= free_bytes(device),
        "chunk_tflop": round(flops / 1e12, 4),
        "decode_tflop": round(decode / 1e12, 4),
        "fps_at_most": float(f"{frames * flops_per_s / flops:.3g}"),
        "fps_decoded_at_most": float(f"{frames * flops_per_s / (flops + decode):.3g}"),
        "missing": missing,
        "fix": _fix(preset) if missing else None,
    }


def _compile_problem(device: torch.device) -> str | None:
    """Return why nothing can be compiled here, with what would help, or None."""
    try:
        require_compiler(device)
    except InvalidRequest as error:
        return error.metadata["allowed"]
    return None


def _missing_parts(preset: Preset, weights_dir: Path) -> list[str]:
    parts = ["transformer", "text_encoder", "tokenizer", "vae/wan"] + ["lora"] * (preset.files.lora is not None)
    missing = []
    for part in parts:
        try:
            find_part(preset, part, weights_dir)
        except BadCheckpoint:
            missing.append(part)
    return missing


def _fix(preset: Preset) -> str:
    if preset.files.transformer is None:
        return "put transformer.safetensors into the weights folder: it has no public file"
    return f"causal-forcing download {preset.name}"


def describe(found: dict[str, Any]) -> str:
    """Return what was found for people."""
    device = found["device"]
    driver = f", driver {device['driver']}, CUDA {device['cuda']}" if device.get("driver") else ""
    speed = f"{device['matmul_tflops_per_s']} TFLOP/s in a matrix product"
    lines = [
        f"device    {device['kind']} {device['name']}{driver}: {speed}, "
        f"{found['free_memory_bytes'] / 1e9:.1f} GB of memory free",
        f"torch     {found['machine']['torch']}, Python {found['machine']['python']}",
        f"weights   {found['weights_dir']}: {found['free_disk_bytes'] / 1e9:.1f} GB of disk free",
        f"compiled  {found['compile_problem'] or found['compile_cache']}",
    ]
    if "cold_start_s" in found:
        phases = found["cold_start_s"]
        lines.append(f"start     of the embedded model, cold: {StartUp(phases=phases)}")
    for name, present in found["modules"].items():
        if not present:
            lines.append(f"missing   {name}: pip install 'causal-forcing-serve[{_OPTIONAL[name]}]'")
    lines.append("presets   (frames a second: at most, if generator and `wan` decoder ran at that speed)")
    for preset in found["presets"]:
        verdict = "fits" if preset["fits"] else "does not fit"
        text = f"  {preset['name']:32} needs {preset['needs_bytes'] / 1e9:6.2f} GB, {verdict}; "
        text += f"{preset['fps_decoded_at_most']:g} FPS ({preset['fps_at_most']:g} if decoded elsewhere)"
        if preset["missing"]:
            text += f"; missing {', '.join(preset['missing'])}: {preset['fix']}"
        lines.append(text)
    return "\n".join(lines)
