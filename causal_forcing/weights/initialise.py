"""Seeded random weights, for models that are not trained yet: the same bits in every process."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

_BIAS_STD = 0.1
_MODULATION_STD = 0.5
_NORMS = ("norm", "gamma", "layer_norm")


def seeded_weights(module: nn.Module, seed: int, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return random float32 weights for every tensor of a module's state dict.

    Every tensor is drawn from its own generator, seeded by its name, so that neither the order of modules nor the
    presence of others changes it. Linear and convolution weights keep the variance of what passes through them; norms
    are ones.

    Args:
        module: Of any device, ``meta`` included; only names and shapes are read.
        seed: Of this part of the model.
        device: Where to draw them: a GPU draws billions in a second, but other numbers than a CPU.
    """
    return {name: draw_weight(name, tensor, seed, device=device) for name, tensor in module.state_dict().items()}


def draw_weight(name: str, like: Tensor, seed: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Return one seeded float32 weight, by its name and shape."""
    owner, _, leaf = name.rpartition(".")
    if leaf in ("weight", "gamma") and (leaf == "gamma" or any(n in owner.rpartition(".")[2] for n in _NORMS)):
        return torch.ones(like.shape, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))
    values = torch.randn(like.shape, generator=generator, device=device)
    return values.mul_(_std(name, leaf, like))


def _std(name: str, leaf: str, like: Tensor) -> float:
    if leaf == "modulation":
        return _MODULATION_STD
    if leaf == "bias":
        return _BIAS_STD
    if name.endswith(("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")):
        return 1.0
    fan_in = math.prod(like.shape[1:])
    if name.endswith("SelfAttention.q.weight"):  # UMT5 does not scale its scores
        return 1 / fan_in
    return 1 / math.sqrt(fan_in)
