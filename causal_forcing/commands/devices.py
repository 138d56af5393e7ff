"""The options `--device` and `--dtype` of commands that compute."""

from __future__ import annotations

import torch

from causal_forcing.errors import InvalidRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a model can compute in."""


def choose_device(name: str | None) -> torch.device:
    """Return a device by name; None takes the first GPU, or the CPU where there is none.

    Raises:
        InvalidRequest: If it is of another kind, or this machine has no such one (field ``device``).
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidRequest("device", name, "must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest("device", name, f"this machine has {torch.cuda.device_count()} CUDA devices")
    return device
