"""The generator and text encoder as one set of named parameters, and the preset that a training folder makes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from causal_forcing.config import VaeConfig
from causal_forcing.flow import TRAIN_STEPS, shifted
from causal_forcing.geometry import Geometry
from causal_forcing.presets import Preset, get_preset
from causal_forcing.rope import RotaryEmbedding
from causal_forcing.tokenizer import Tokenizer
from causal_forcing.training.text import embed, load_tokenizer, trainable_encoder
from causal_forcing.training.vae import CONFIG, LIGHT_CONFIG
from causal_forcing.training.world import SIDE
from causal_forcing.transformer import CausalTransformer

GEOMETRY = Geometry(SIDE, SIDE)

SINK_FRAMES = 1
"""First latent frames of a scene that attention always sees: what its objects look like is decided there."""

WINDOW_FRAMES = 8 + SINK_FRAMES
"""Latent frames that attention sees, in training as in use: one period of the world's motions, and the sink."""

GENERATORS = ("cd", "ar", "guided", "cd-ar", "cd-bidirectional")
"""Stages whose result is a causal generator."""

MIDDLE_SHARE, MIDDLE_MEAN, MIDDLE_STD = 0.5, 0.4, 0.8
"""Share of noise levels from a logit-normal distribution, and its parameters."""


@dataclass(frozen=True)
class Generator:
    """What is trained in the stages after the VAE.

    Attributes:
        transformer: The causal transformer.
        encoder: The text encoder.
        tokenizer: Made for it.
        preset: Sizes of both.
        rotary: For the world's frame size.
    """

    transformer: CausalTransformer
    encoder: nn.Module
    tokenizer: Tokenizer
    preset: Preset
    rotary: RotaryEmbedding

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters by name, ``transformer.`` and ``text_encoder.`` first."""
        named: dict[str, Tensor] = {f"transformer.{n}": p for n, p in self.transformer.named_parameters()}
        return named | {f"text_encoder.{n}": p for n, p in self.encoder.named_parameters()}

    @property
    def transformer_parameters(self) -> dict[str, Tensor]:
        """The transformer's parameters by name, for stages that keep the text encoder."""
        return {name: value for name, value in self.parameters.items() if name.startswith("transformer.")}

    def embed(self, ids: Tensor) -> Tensor:
        """Return prompt embeddings ``[N, text_len, text_dim]`` of token ids ``[N, L]``, with gradients."""
        return embed(self.encoder, ids, self.preset.text_encoder.text_len)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy parameters in, all of them by name."""
        for name, value in self.parameters.items():
            value.copy_(tensors[name])


def new_generator(root: Path, seed: int, preset: Preset | None = None, device: torch.device | str = "cpu") -> Generator:
    """Return a generator of seeded weights, the same on every device; ``root`` without tokenizer gets one."""
    preset = preset or get_preset("tiny")
    tokenizer = load_tokenizer(root, preset.text_encoder.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = CausalTransformer(preset.transformer)
        initialise(transformer)
    rotary = RotaryEmbedding(preset.transformer, GEOMETRY, torch.device(device))
    encoder = trainable_encoder(preset.text_encoder, seed)
    return Generator(transformer.to(device), encoder.to(device), tokenizer, preset, rotary)


def initialise(transformer: CausalTransformer) -> None:
    """Fill a transformer with Wan's initial values: Xavier linears, small embeddings, a head of zeros.

    Source: Wan2.1 ``wan/modules/model.py`` (init_weights).
    """
    dim = transformer.config.dim
    for name, value in transformer.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(value, std=1 / math.sqrt(dim))
        elif name.endswith("bias") or name == "head.head.weight":
            nn.init.zeros_(value)
        elif name.startswith(("text_embedding", "time_embedding")):
            nn.init.normal_(value, std=0.02)
        elif value.ndim > 1:
            nn.init.xavier_uniform_(value.flatten(1))


def draw_levels(shape: tuple[int, ...], generator: torch.Generator, shift: float) -> Tensor:
    """Return noise levels, float32 in (0, 1]: half of them uniform, half of them around the middle, all shifted.

    Objects get their shapes at middle levels. Source: Esser et al. 2024 (arXiv 2403.03206), logit-normal sampling.
    """
    device = generator.device
    uniform = 1 - torch.randint(TRAIN_STEPS, shape, generator=generator, device=device) / TRAIN_STEPS
    middle = torch.sigmoid(MIDDLE_MEAN + MIDDLE_STD * torch.randn(shape, generator=generator, device=device))
    chosen = torch.rand(shape, generator=generator, device=device) < MIDDLE_SHARE
    return shifted(torch.where(chosen, middle, uniform), shift)


def add_noise(clean: Tensor, sigmas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy frames and their velocities.

    Args:
        clean: ``[B, 16, F, h, w]``.
        sigmas: ``[B, F]``.
        generator: Draws the noise.
    """
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    level = sigmas[:, None, :, None, None]
    return (1 - level) * clean + level * noise, noise - clean


def embedded_preset(root: Path) -> Preset:
    """Return the ``tiny`` preset as a training folder defines it: VAE sizes, latent statistics, window, sink."""
    index = json.loads((root / "latents" / "index.json").read_text())

    def measured(config: VaeConfig) -> VaeConfig:
        return dataclasses.replace(config, latent_mean=tuple(index["mean"]), latent_std=tuple(index["std"]))

    return dataclasses.replace(
        get_preset("tiny"),
        vaes={"wan": measured(CONFIG), "lightvae": measured(LIGHT_CONFIG)},
        window_frames=WINDOW_FRAMES,
        sink_frames=SINK_FRAMES,
        trained=True,
    )


def load_generator(root: Path, stage: str) -> dict[str, Tensor]:
    """Return the averaged parameters of a whole generator; a stage that kept the text encoder has its teacher's."""
    tensors = load_stage(root, stage)
    if any(name.startswith("text_encoder.") for name in tensors):
        return tensors
    return load_stage(root, "bidirectional" if stage == "cd-bidirectional" else "ar") | tensors


def load_stage(root: Path, stage: str, *, averaged: bool = True) -> dict[str, Tensor]:
    """Return a stage's parameters, the moving average or the last ones."""
    if averaged:
        return load_file(root / stage / "ema.safetensors")
    tensors = load_file(root / stage / "last.safetensors")
    return {name.removeprefix("value/"): value for name, value in tensors.items() if name.startswith("value/")}
