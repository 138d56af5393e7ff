"""Mixing of prompt embeddings: weighted prompts at one moment, and transitions between two moments.

Source: daydreamlive/scope@68b0f956 (EmbeddingBlender), whose rules are restated in our own terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from causal_forcing.prompts import Blend

_EPS = 1e-8
_SMALLEST_ANGLE = 1e-4
"""Below this angle (radians) slerp is numerically a straight line."""

_LARGEST_ANGLE = math.pi - 0.01
"""Above this angle slerp goes straight, too: between opposite vectors no arc is the shortest."""

NEGLIGIBLE_CHANGE = 0.01
"""A transition over a smaller Frobenius distance than this snaps."""


def blend(embeds: Sequence[Tensor], weights: Sequence[float], method: Blend = Blend.LINEAR) -> Tensor:
    """Return one embedding mixed from several, ``[1, text_len, text_dim]``.

    The linear sum is rescaled to the weighted mean of the inputs' Frobenius norms, so that a blend is as strong as its
    parts. ``slerp`` takes exactly two.

    Args:
        embeds: One ``[1, text_len, text_dim]`` per prompt.
        weights: As many numbers of at least 0, not all 0; normalised here.
        method: How to mix.

    Raises:
        ValueError: If the counts differ, the weights sum to 0, or ``slerp`` is asked of other than two.
    """
    if len(embeds) != len(weights) or not embeds:
        raise ValueError(f"{len(embeds)} embeddings with {len(weights)} weights")
    total = float(sum(weights))
    if total <= 0:
        raise ValueError("weights sum to 0")
    shares = [w / total for w in weights]
    if len(embeds) == 1:
        return embeds[0]
    if method is Blend.SLERP:
        if len(embeds) != 2:
            raise ValueError(f"slerp of {len(embeds)} embeddings")
        return interpolate(embeds[0], embeds[1], shares[1], Blend.SLERP)
    mixed = torch.stack([s * e.float() for s, e in zip(shares, embeds, strict=True)]).sum(0)
    norm = torch.stack([s * e.float().norm() for s, e in zip(shares, embeds, strict=True)]).sum()
    rescaled: Tensor = mixed * (norm / mixed.norm().clamp_min(_EPS))
    return rescaled.to(embeds[0].dtype)


def interpolate(source: Tensor, target: Tensor, t: float, method: Blend = Blend.LINEAR) -> Tensor:
    """Return the embedding a share ``t`` of the way from ``source`` to ``target``.

    Args:
        source: ``[1, text_len, text_dim]``.
        target: The same shape.
        t: 0 gives ``source``, 1 gives ``target``, exactly.
        method: ``linear``, or ``slerp`` per token over the channels.
    """
    if t <= 0:
        return source
    if t >= 1:
        return target
    a, b = source.float(), target.float()
    line = torch.lerp(a, b, t)
    if method is Blend.LINEAR:
        return line.to(source.dtype)
    a_norm = a.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    b_norm = b.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    angle = ((a / a_norm) * (b / b_norm)).sum(-1, keepdim=True).clamp(-1, 1).acos()
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle).clamp_min(_EPS)
    is_straight = (angle < _SMALLEST_ANGLE) | (angle > _LARGEST_ANGLE)
    return torch.where(is_straight, line, arc).to(source.dtype)


def is_negligible(source: Tensor, target: Tensor) -> bool:
    """Return whether a transition between the two would show nothing; waits for the device that they are on."""
    return float((target.float() - source.float()).norm()) < NEGLIGIBLE_CHANGE
