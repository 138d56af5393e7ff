"""Runs the reference's transformer from a checkout beside this repository, so that it can be timed in the same rounds.

The checkout is github.com/thu-ml/Causal-Forcing (its code stays there); it needs `diffusers` and `einops`. Its flash
attention runs on GPUs only and is replaced by PyTorch's attention, everything else is as it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_forcing.config import TransformerConfig


def load_reference(checkout: Path, config: TransformerConfig, weights: dict[str, Tensor]) -> nn.Module:
    """Return the reference's model of these sizes with these weights."""
    for name in ("wan", "wan.modules"):  # their __init__ files import what needs a GPU
        package = ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    attention = ModuleType("wan.modules.attention")
    attention.attention = attention.flash_attention = _attention  # type: ignore[attr-defined]
    sys.modules["wan.modules.attention"] = attention
    model = importlib.import_module("wan.modules.causal_model").CausalWanModel(
        dim=config.dim,
        ffn_dim=config.ffn_dim,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        freq_dim=config.freq_dim,
        text_dim=config.text_dim,
        text_len=config.text_len,
        eps=config.eps,
    )
    model.load_state_dict(weights)
    reference: nn.Module = model.requires_grad_(False).eval()
    return reference


def reference_call(
    model: nn.Module, latents: Tensor, timestep: float, *, text: Tensor, keys: list[Tensor], values: list[Tensor]
) -> Callable[[], Tensor]:
    """Return a call that runs one forward pass of the newest frame of a full cache, which it writes again.

    Args:
        model: From :func:`load_reference`.
        latents: ``[1, 16, F, h, w]``.
        timestep: Of all frames.
        text: ``[1, text_len, text_dim]``.
        keys: Per layer ``[1, H, rows, D]``; the newest frames' rows are the last ones. Copied.
        values: Per layer, the same shape. Copied.
    """
    rows = keys[0].shape[2]
    new_rows = latents.shape[2] * (latents.shape[3] // 2) * (latents.shape[4] // 2)
    cache = [
        {
            "k": k.transpose(1, 2).contiguous(),
            "v": v.transpose(1, 2).contiguous(),
            "global_end_index": torch.tensor([rows]),
            "local_end_index": torch.tensor([rows]),
        }
        for k, v in zip(keys, values, strict=True)
    ]
    text_cache: list[dict[str, Any]] = [{"is_init": False} for _ in keys]
    arguments = {
        "t": torch.full((1, latents.shape[2]), timestep),
        "context": [text[0]],
        "seq_len": rows,
        "kv_cache": cache,
        "crossattn_cache": text_cache,
        "current_start": rows - new_rows,
    }

    def call() -> Tensor:
        with torch.inference_mode():
            flow: Tensor = model(latents, **arguments)
            return flow

    return call


def _attention(q: Tensor, k: Tensor, v: Tensor, **_unused: object) -> Tensor:
    """Attention of ``[B, L, H, D]``, without a mask: the reference's key lengths are all full here."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
