"""Comparison with golden tensors: every file of a folder goes through the production classes, noise injected.

The folder's layout is that of ``tests/golden/README.md``; dimensions are read from each file's ``config``. A file of
unknown contents, a run that could not be executed, and an empty folder are failures.

In float32, on whatever device, the largest absolute error counts. In bfloat16 that says little, since one product of
large numbers decides it: there the error is the root mean square of the difference over that of the golden tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causal_forcing.config import DEFAULT_SHIFT, SinkRope, TextEncoderConfig, TransformerConfig, VaeConfig
from causal_forcing.engine import Engine, choose_layout
from causal_forcing.errors import CausalForcingError
from causal_forcing.flow import sigma_table, timestep_table, to_x0, warp_steps
from causal_forcing.geometry import PATCH, SPATIAL_STRIDE, Geometry
from causal_forcing.presets import get_preset
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.session import Chunk, Session
from causal_forcing.text_encoder import build_encoder, encode_ids
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import WanVae
from causal_forcing.weights import umt5_to_transformers


@dataclass(frozen=True)
class Numerics:
    """Where and in what the engine computes, and how far from the goldens it may end.

    Attributes:
        device: Of weights and sessions.
        dtype: Of weights, latents and caches; the goldens are float32.
        transformer: Tolerance of everything that the transformer makes.
        vae: Tolerance of the VAE's latents and pixels.
        text_encoder: Tolerance of prompt embeddings.
        scheduler: Tolerance of noise levels, which are always float32.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    transformer: float = 2e-5
    vae: float = 1e-4
    text_encoder: float = 1e-4
    scheduler: float = 1e-5

    @property
    def is_relative(self) -> bool:
        """Whether errors are relative root mean squares rather than largest absolute differences."""
        return self.dtype is not torch.float32

    def place(self, tensor: Tensor) -> Tensor:
        """Return a tensor there, floating point in that dtype."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


def numerics_of(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Numerics:
    """Return what holds on a device in a dtype.

    In float32 an independent implementation reached 2e-6 of the transformer's values. A bfloat16 has 8 significant
    bits, so one rounding is off by up to 0.2 %, and a run is a chain of them: up to 5 passes a chunk, and every chunk
    reads what those before it wrote. On a CPU, whose kernels round where a GPU's do, the worst results of the golden
    runs were off by 1.0 % (transformer), 2.3 % (VAE) and 3.4 % (text encoder); the tolerances are twice that.
    """
    if dtype is torch.float32:
        return Numerics(torch.device(device))
    return Numerics(torch.device(device), dtype, transformer=0.02, vae=0.046, text_encoder=0.068)


_NOT_EXECUTED = (CausalForcingError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OSError)
"""What a damaged or foreign golden file can make a run trip over."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        file: The golden file.
        name: What was compared.
        error: As :attr:`Numerics.is_relative` says; infinite for a shape that differs or a value that is not finite.
        tolerance: Largest allowed.
        problem: Why nothing could be compared, or None.
    """

    file: str
    name: str
    error: float
    tolerance: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the comparison was made and is within tolerance."""
        return self.problem is None and self.error <= self.tolerance


@dataclass(frozen=True)
class Golden:
    """One golden file: its tensors and its ``config``."""

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Return the file's contents."""
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            return cls(path.stem, {key: file.get_tensor(key) for key in file.keys()}, config)  # noqa: SIM118

    def weights(self) -> dict[str, Tensor]:
        """Return the weights stored beside the data."""
        return {key.removeprefix("weights."): t for key, t in self.tensors.items() if key.startswith("weights.")}


@dataclass(frozen=True)
class RecordedNoise:
    """Noise of a recorded run, as a :class:`~causal_forcing.noise.NoiseSource`.

    Attributes:
        start: ``[1, C, frames, h, w]`` starting noise.
        after_step: ``[1, C, frames, steps, h, w]`` noise added after each step.
        first_chunk: Index of the first generated chunk.
        chunk_frames: Latent frames a chunk.
    """

    start: Tensor
    after_step: Tensor
    first_chunk: int
    chunk_frames: int

    def __call__(self, chunk: int, draw: int, shape: tuple[int, ...]) -> Tensor:
        """Return one draw; see :class:`~causal_forcing.noise.NoiseSource`."""
        first = (chunk - self.first_chunk) * self.chunk_frames
        frames = slice(first, first + shape[2])
        return self.start[:, :, frames] if draw == 0 else self.after_step[:, :, frames, draw - 1]


def run_parity(folder: Path, numerics: Numerics | None = None) -> list[Check]:
    """Return every comparison of a golden folder; a folder without golden files gives one failed check.

    Beside golden files the folder may hold text for people (``*.md``); any other file is a failed check, too.

    Args:
        folder: Where the golden files are.
        numerics: None compares float32 on the CPU.
    """
    numerics = numerics or numerics_of()
    paths = sorted(p for p in folder.glob("*") if p.suffix != ".md" and not p.name.startswith("."))
    if not paths:
        return [Check(str(folder), "folder", float("inf"), 0.0, "no golden files (*.safetensors) in it")]
    weights_path = folder / "dit_weights.safetensors"
    checks: list[Check] = []
    for path in paths:
        try:
            found = list(_compare(Golden.read(path), weights_path, numerics))
        except _NOT_EXECUTED as error:
            found = [Check(path.stem, "run", float("inf"), 0.0, f"not executed: {type(error).__name__}: {error}")]
        checks += found
    return checks or [Check(str(folder), "folder", float("inf"), 0.0, "weights, but no run to compare")]


def format_table(checks: list[Check]) -> str:
    """Return the comparisons as a table for people."""
    width = max(len(f"{c.file} {c.name}") for c in checks)
    rows = [f"{'run':{width}}  {'error':>13}  {'tolerance':>9}"]
    for check in checks:
        verdict = "ok" if check.passed else f"FAILED {check.problem or ''}".rstrip()
        name = f"{check.file} {check.name}"
        rows.append(f"{name:{width}}  {check.error:13.2e}  {check.tolerance:9.0e}  {verdict}")
    failed = sum(not c.passed for c in checks)
    rows.append(f"{len(checks)} comparisons, {failed} failed")
    return "\n".join(rows)


def _compare(golden: Golden, weights_path: Path, numerics: Numerics) -> Iterator[Check]:
    kinds: dict[str, Callable[[], Iterator[Check]]] = {
        "patch_embedding.weight": lambda: iter(()),  # the transformer runs' weights; no run of its own
        "sigmas": lambda: _compare_scheduler(golden, numerics),
        "pixels": lambda: _compare_vae(golden, numerics),
        "prompt_embeds": lambda: _compare_text_encoder(golden, numerics),
        "renoise": lambda: _compare_transformer(golden, Golden.read(weights_path), numerics),
    }
    kind = next((key for key in kinds if key in golden.tensors), None)
    if kind is None:
        raise ValueError(f"unknown contents: {sorted(golden.tensors)[:5]}")
    yield from kinds[kind]()


def _check(
    golden: Golden,
    name: str,
    ours: Tensor,
    *,
    tolerance: float,
    relative: bool = False,
    reference: Tensor | None = None,
) -> Check:
    expected = (golden.tensors[name] if reference is None else reference).double()
    if ours.shape != expected.shape:
        problem = f"shape {list(ours.shape)}, expected {list(expected.shape)}"
        return Check(golden.name, name, float("inf"), tolerance, problem)
    difference = ours.double().cpu() - expected
    error = float(difference.norm() / expected.norm() if relative else difference.abs().max())
    return Check(golden.name, name, error if math.isfinite(error) else float("inf"), tolerance)


def _compare_scheduler(golden: Golden, numerics: Numerics) -> Iterator[Check]:
    check = partial(_check, golden, tolerance=numerics.scheduler)
    yield check("sigmas", sigma_table())
    yield check("timesteps", timestep_table())
    for name, steps in (("warp_4", (1000, 750, 500, 250)), ("warp_2", (1000, 500)), ("warp_1", (1000,))):
        yield check(name, _timesteps(steps))


def _timesteps(steps: tuple[int, ...]) -> Tensor:
    return torch.tensor([level.timestep for level in warp_steps(steps)])


def _compare_vae(golden: Golden, numerics: Numerics) -> Iterator[Check]:
    config = golden.config
    vae = WanVae(
        VaeConfig(
            base_dim=config["dim"],
            dim_mult=tuple(config["dim_mult"]),
            num_res_blocks=config["num_res_blocks"],
            temporal_downsample=tuple(config["temperal_downsample"]),
            z_dim=config["z_dim"],
            latent_mean=tuple(golden.tensors["latent_mean"].tolist()),
            latent_std=tuple(golden.tensors["latent_std"].tolist()),
        )
    )
    vae.load_state_dict(golden.weights())
    vae.to(numerics.device, numerics.dtype)
    check = partial(_check, golden, tolerance=numerics.vae, relative=numerics.is_relative)
    with torch.inference_mode():
        latent, video = (numerics.place(golden.tensors[name]) for name in ("latent", "video"))
        yield check("pixels", vae.decode_unclamped(latent, vae.new_decoder_state(_geometry_of(latent))))
        yield check("video_latent", vae.encode(video))
        yield check("image_latent", vae.encode(video[:, :, :1]))


def _compare_text_encoder(golden: Golden, numerics: Numerics) -> Iterator[Check]:
    c = golden.config
    config = TextEncoderConfig(
        vocab_size=c["vocab"],
        d_model=c["dim"],
        d_kv=c["dim_attn"] // c["num_heads"],
        num_heads=c["num_heads"],
        d_ff=c["dim_ffn"],
        num_layers=c["num_layers"],
        num_buckets=c["num_buckets"],
        text_len=golden.tensors["ids"].shape[1],
    )
    encoder = build_encoder(config)
    encoder.load_state_dict(umt5_to_transformers(golden.weights()))
    encoder.to(numerics.device, numerics.dtype)
    check = partial(_check, golden, tolerance=numerics.text_encoder, relative=numerics.is_relative)
    with torch.inference_mode():
        ids, mask = (numerics.place(golden.tensors[name]) for name in ("ids", "mask"))
        ours = encode_ids(encoder, ids, mask, config.text_len).cpu()
    yield check("prompt_embeds", ours)
    real = golden.tensors["mask"].bool()
    yield check("raw", ours[real], reference=golden.tensors["raw"][real])


def _compare_transformer(golden: Golden, weights: Golden, numerics: Numerics) -> Iterator[Check]:
    session, first_forward = _open_session(golden, weights, numerics)
    check = partial(_check, golden, tolerance=numerics.transformer, relative=numerics.is_relative)
    check_schedule = partial(_check, golden, tolerance=numerics.scheduler)
    chunk_frames = session.engine.preset.chunk_frames
    chunks: list[Chunk] = []
    _switch_prompt(session, golden, 0)
    if "initial" in golden.tensors:
        chunks.append(session.start_from(_channels_first(golden.tensors["initial"])))
    switches = {chunk: number for number, chunk in enumerate(golden.config.get("switch_at", ()), start=1)}
    for index in range(golden.config["num_frames"] // chunk_frames):
        if index in switches:
            _switch_prompt(session, golden, switches[index])
        chunks.append(session.generate_chunk())
    latents = _frames_first(torch.cat([chunk.latents for chunk in chunks], dim=2))
    yield check("first_flow", _frames_first(first_forward[0]))
    config = session.config
    first_steps = config.first_chunk_steps or config.denoising_steps
    first_x0 = to_x0(first_forward[1], first_forward[0], warp_steps(first_steps)[0].sigma)
    yield check("first_x0", _frames_first(first_x0))
    yield check("latents", latents)
    cache = session.state.cache
    last = session.engine.transformer.config.num_layers - 1
    yield check("kv_k_layer0", cache.in_order(0)[0].transpose(1, 2))
    yield check("kv_v_last", cache.in_order(last)[1].transpose(1, 2))
    yield check_schedule("warped_steps", _timesteps(config.denoising_steps))
    yield check_schedule("warped_first_steps", _timesteps(first_steps))


def _open_session(golden: Golden, weights: Golden, numerics: Numerics) -> tuple[Session, list[Tensor]]:
    """Return a session that replays the run's noise, and a list that will hold its first velocity and input."""
    c = golden.config
    config = TransformerConfig(
        dim=c["dim"],
        ffn_dim=c["ffn_dim"],
        num_heads=c["num_heads"],
        num_layers=c["num_layers"],
        freq_dim=c["freq_dim"],
        text_dim=c["text_dim"],
        text_len=c["text_len"],
    )
    transformer = CausalTransformer(config)
    transformer.load_state_dict(dict(weights.tensors))
    transformer.to(numerics.device, numerics.dtype).requires_grad_(False)
    chunk_frames = c["num_frame_per_block"]
    choose_layout(transformer, chunk_frames * (c["latent_h"] // PATCH) * (c["latent_w"] // PATCH))
    preset = replace(
        get_preset("tiny"), name=golden.name, transformer=config, chunk_frames=chunk_frames, shift=DEFAULT_SHIFT
    )
    windowed = c["local_attn_size"] != -1
    engine = Engine(preset, transformer)
    session_config = engine.session_config(
        height=c["latent_h"] * SPATIAL_STRIDE,
        width=c["latent_w"] * SPATIAL_STRIDE,
        denoising_steps=tuple(c["steps"]),
        first_chunk_steps=tuple(c["first_steps"]) if "first_steps" in c else None,
        window_frames=c["local_attn_size"] if windowed else None,
        max_frames=c["cache_frames"],
        sink_frames=c["sink_size"],
        sink_rope=SinkRope.FIXED,
    )
    noise = RecordedNoise(
        start=_channels_first(golden.tensors["noise"]),
        after_step=golden.tensors["renoise"].permute(0, 3, 1, 2, 4, 5),  # [1, F, steps, C, h, w] -> [1, C, F, ...]
        first_chunk=1 if "initial" in golden.tensors else 0,
        chunk_frames=chunk_frames,
    )
    first: list[Tensor] = []

    def keep_first(_module: torch.nn.Module, arguments: tuple[Any, ...], velocity: Tensor) -> None:
        if not first:
            first.extend((velocity.clone(), arguments[0].clone()))

    transformer.register_forward_hook(keep_first)
    return engine.new_session(session_config, noise=noise), first


def _switch_prompt(session: Session, golden: Golden, number: int) -> None:
    name = f"prompt{number}"
    update = PromptUpdate((WeightedPrompt(name),), prompt_id=name)
    session.update_prompt(update, [PromptEmbedding(golden.tensors[name], name)])


def _geometry_of(latents: Tensor) -> Geometry:
    return Geometry(latents.shape[-2] * SPATIAL_STRIDE, latents.shape[-1] * SPATIAL_STRIDE)


def _channels_first(x: Tensor) -> Tensor:
    """Return ``[1, C, F, h, w]`` of a golden ``[1, F, C, h, w]``."""
    return x.transpose(1, 2)


def _frames_first(x: Tensor) -> Tensor:
    """Return a golden's ``[1, F, C, h, w]`` of our ``[1, C, F, h, w]``."""
    return x.transpose(1, 2)
