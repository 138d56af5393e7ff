"""Whether a model and its sessions fit on a device, decided by arithmetic before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from causal_forcing.config import SessionConfig
from causal_forcing.errors import OutOfMemory
from causal_forcing.kv_cache import CacheLayout, KeyValueCache
from causal_forcing.presets import Preset
from causal_forcing.text_encoder import DEFAULT_CACHE_BYTES, build_encoder
from causal_forcing.transformer import CausalTransformer
from causal_forcing.weights.loading import build_vae
from causal_forcing.weights.working_set import decoding_bytes, encoding_bytes

RESERVE_BYTES = 256 * 2**20
"""What is left to the runtime."""

ACTIVATIONS = "one block's activations"
"""Name of the item of a plan without a VAE that is needed only while a chunk is made."""

PROMPT_CACHE = "kept prompts"
"""Name of the item for the embeddings that a text encoder keeps, once it has seen many prompts."""

_META = torch.device("meta")


@dataclass(frozen=True)
class MemoryPlan:
    """What a process needs on its device, item by item.

    Attributes:
        items: ``(what, bytes)``.
    """

    items: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        """Sum of the items."""
        return sum(size for _, size in self.items)

    @property
    def needed_bytes(self) -> int:
        """What a device must have free: the sum, and what is left to the runtime."""
        return self.total_bytes + RESERVE_BYTES

    def __str__(self) -> str:
        """Return the sum, e.g. ``generator 2.84 GB + ... = 8.1 GB``."""
        terms = " + ".join(f"{what} {_shown(size)}" for what, size in self.items if size)
        return f"{terms} = {_shown(self.total_bytes)}"


def required_bytes(
    preset: Preset,
    vae: str | None,
    config: SessionConfig,
    dtype: torch.dtype,
    *,
    text_encoder: bool = True,
    sessions: int = 1,
    given_frames: int = 0,
) -> MemoryPlan:
    """Return the memory that an engine and its sessions need, from modules and states built on the meta device.

    A chunk is made, a chunk is decoded, or given frames are encoded, one after the other: the largest of these counts.

    Args:
        preset: Which model.
        vae: Its VAE type, or None where another process decodes.
        config: Of every session.
        dtype: Of weights and caches.
        text_encoder: Whether the text encoder is loaded here too.
        sessions: Sessions at a time; 0 for the engine alone.
        given_frames: Latent frames that a session may begin with, encoded and decoded here at once; 0 where none are.

    Raises:
        InvalidRequest: If the preset has no such VAE.
    """
    sizes = preset.transformer
    with _META:
        items = [("generator weights", _weight_bytes(CausalTransformer(sizes), dtype))]
    keys_and_values, cross = cache_bytes(preset, config, dtype)
    decoder, work = 0, {ACTIVATIONS: _activation_bytes(preset, config, dtype)}
    if vae is not None:
        vae_sizes = preset.vae_config(vae)
        module, _ = build_vae(vae_sizes)
        items.append((f"VAE weights ({vae})", _weight_bytes(module, dtype)))
        decoder = module.new_decoder_state(config.geometry, device=_META, dtype=dtype).nbytes
        latent_frames = max(preset.chunk_frames, given_frames)
        work["decoding"] = decoding_bytes(vae_sizes, config.geometry, dtype, latent_frames)
        if given_frames:
            work["encoding of given frames"] = encoding_bytes(vae_sizes, config.geometry, dtype, given_frames)
    if text_encoder:
        items.append(("text encoder weights", _weight_bytes(build_encoder(preset.text_encoder, _META), dtype)))
        items.append((PROMPT_CACHE, DEFAULT_CACHE_BYTES))
    times = f"{sessions} x " if sessions != 1 else ""
    items += [
        (f"{times}keys and values of {config.cache_frames} frames", sessions * keys_and_values),
        (f"{times}prompt keys and values", sessions * cross),
        (f"{times}decoder state", sessions * decoder),
        max(work.items(), key=lambda item: item[1]),
    ]
    return MemoryPlan(tuple(items))


def cache_bytes(preset: Preset, config: SessionConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of one session's keys and values: of its frames, and of its prompt."""
    sizes = preset.transformer
    layout = CacheLayout(
        capacity=config.cache_frames,
        sink_frames=config.sink_frames,
        sink_rope=config.sink_rope,
        tokens_per_frame=config.geometry.tokens_per_frame,
        evicts=config.window_frames is not None,
    )
    frames = KeyValueCache(sizes, layout, device=_META, dtype=dtype).nbytes
    return frames, 2 * sizes.num_layers * sizes.text_len * sizes.dim * dtype.itemsize


def _weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def _activation_bytes(preset: Preset, config: SessionConfig, dtype: torch.dtype) -> int:
    """Return the tokens of a chunk, at the feed-forward's width and eight times at the model's."""
    sizes = preset.transformer
    tokens = preset.chunk_frames * config.geometry.tokens_per_frame
    return tokens * (sizes.ffn_dim + 8 * sizes.dim) * dtype.itemsize


def free_bytes(device: torch.device | str) -> int:
    """Return the memory that is free on a device: of the GPU, or of this machine (and its cgroup) for the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available_ram(), _cgroup_free())


def require_memory(
    plan: MemoryPlan, device: torch.device | str, *, free: Callable[[torch.device | str], int] = free_bytes
) -> None:
    """Refuse a device that cannot hold a plan, keeping 256 MB for the runtime.

    Args:
        plan: From :func:`required_bytes`.
        device: Where it is to go.
        free: Measures the device; tests inject another.

    Raises:
        OutOfMemory: With the arithmetic in its message, and what would make it fit.
    """
    available = free(device)
    if plan.needed_bytes <= available:
        return
    raise OutOfMemory(
        f"{device} has {_shown(available)} free, but {plan} is needed, and {_shown(RESERVE_BYTES)} for the runtime; "
        "a smaller window_frames, height or width, a lighter VAE, bfloat16, or a text encoder elsewhere needs less",
        metadata={"needed_bytes": str(plan.needed_bytes), "free_bytes": str(available)},
    )


def _available_ram() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what the container may still take, reclaimable file pages included; unlimited outside a container."""
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        fields = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - used + int(fields["inactive_file"])
    except (OSError, ValueError, KeyError):  # no cgroup v2, or "max"
        return 2**63


def _shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.2f} MB"
