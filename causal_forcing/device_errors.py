"""What PyTorch raises when a device fails or is full, as errors of our tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from causal_forcing.errors import DeviceFault, OutOfMemory

FULL = re.compile(r"out of memory|can't allocate memory|_STATUS_ALLOC_FAILED")
"""Texts of a device, or a host, that has no memory left."""

BROKEN = re.compile(r"\b(CUDA|CUDA driver|CUDA NVRTC|cuDNN|cuDNN Frontend|cuFFT|cusolver|HIP|NCCL) error\b")
"""Texts of a call to the device, or to a library on it, that failed; they come as plain ``RuntimeError``.

Source: the checks' macros, pytorch@0220ea5a:aten/src/ATen/cuda/Exceptions.h.
"""


def device_error(error: RuntimeError) -> OutOfMemory | DeviceFault | None:
    """Return the error of our tree that a PyTorch error stands for; None if it is not about the device."""
    import torch  # whoever gets here has it; the gateway, which imports this module, has not

    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory(f"the device ran out of memory: {error}")
    if isinstance(error, torch.AcceleratorError):
        return DeviceFault(f"the device failed: {error}")
    if FULL.search(str(error)):
        return OutOfMemory(f"the device ran out of memory: {error}")
    if BROKEN.search(str(error)):
        return DeviceFault(f"the device failed: {error}")
    return None


@contextmanager
def device_errors() -> Iterator[None]:
    """Let a device's errors leave the block, or the decorated function, as ours.

    Work on a GPU fails where its result is first waited for, which may be a copy to the host long after the call.

    Raises:
        OutOfMemory: If the device, or the host, ran out of memory.
        DeviceFault: If the device, or a library on it, failed.
    """
    try:
        yield
    except RuntimeError as error:
        known = device_error(error)
        if known is None:
            raise
        raise known from error
