"""Linear layers in 8-bit floating point, on GPUs that compute in it; off unless asked for."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from causal_forcing.errors import InvalidRequest
from causal_forcing.transformer import CausalTransformer

FP8 = "fp8_e4m3fn"
"""Weights rounded once, activations on the fly, one scale per tensor."""

QUANTISATIONS = (FP8,)
"""What ``quantization`` may be, beside None."""

_NEEDED_CAPABILITY = (8, 9)
_ONCE_PER_PROMPT = (".cross_attn.k", ".cross_attn.v")


def require_quantisation(quantization: str | None, device: torch.device | str) -> None:
    """Refuse a quantisation that does not exist or cannot run here; called before any weights are loaded.

    Raises:
        InvalidRequest: If it is unknown, torchao is not installed, or the device does not compute in fp8 (field
            ``quantization``).
    """
    if quantization is None:
        return
    if quantization not in QUANTISATIONS:
        allowed = f"must be one of {', '.join(QUANTISATIONS)}, or not given"
        raise InvalidRequest("quantization", quantization, allowed, reason="UNKNOWN_QUANTIZATION")
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) < _NEEDED_CAPABILITY:
        raise InvalidRequest(
            "quantization",
            quantization,
            f"needs a CUDA device of compute capability 8.9 or more (Ada, Hopper or newer), not {device}",
            reason="QUANTIZATION_UNAVAILABLE",
        )
    if importlib.util.find_spec("torchao") is None:
        needed = "needs torchao: pip install 'causal-forcing-serve[fp8]'"
        raise InvalidRequest("quantization", quantization, needed, reason="QUANTIZATION_UNAVAILABLE")


def quantise(transformer: CausalTransformer, quantization: str | None) -> None:
    """Replace the weights of the blocks' linear layers in place; None leaves them.

    The small layers outside the blocks, and the keys and values of the prompt, which are computed once per prompt, keep
    their dtype: they cost no time and carry much of the precision.

    Args:
        transformer: Loaded, LoRAs merged, on a CUDA device.
        quantization: ``fp8_e4m3fn`` or None.

    Raises:
        InvalidRequest: As :func:`require_quantisation`.

    Source: pytorch/ao ``Float8DynamicActivationFloat8WeightConfig``, as thu-ml/Causal-Forcing@1fc7bbc:demo.py uses it.
    """
    require_quantisation(quantization, transformer.device)
    if quantization is None:
        return
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor, quantize_

    quantize_(transformer, Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()), filter_fn=is_quantised)


def is_quantised(module: nn.Module, name: str) -> bool:
    """Return whether a module, by its name in the transformer, is computed in 8 bits."""
    return isinstance(module, nn.Linear) and name.startswith("blocks.") and not name.endswith(_ONCE_PER_PROMPT)
