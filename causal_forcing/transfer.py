"""Host tensors to a device, without waiting for what the device is busy with."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device in a dtype.

    A GPU copies from pageable memory only when everything queued before is done, and keeps the host waiting; from
    pinned memory the copy is queued like any other work. The conversion happens on the device.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True).to(dtype)
