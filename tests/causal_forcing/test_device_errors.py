"""Errors of a device and its libraries, told from errors of ours by their kinds and texts."""

from __future__ import annotations

import pytest
import torch

from causal_forcing.device_errors import device_error, device_errors
from causal_forcing.errors import CausalForcingError, DeviceFault, OutOfMemory


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB"), OutOfMemory),
        (RuntimeError("CUDA error: out of memory"), OutOfMemory),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceFault),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), DeviceFault),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), DeviceFault),
        (RuntimeError("CUDA driver error: unknown error"), DeviceFault),
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceFault),
        (RuntimeError("cuDNN Frontend error: no plan"), DeviceFault),
        (
            RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `f(h)`"),
            DeviceFault,
        ),
        (RuntimeError("HIP error: invalid device function"), DeviceFault),
    ],
)
def test_a_devices_error_is_ours_and_keeps_its_text(raised: RuntimeError, kind: type[CausalForcingError]) -> None:
    with pytest.raises(kind) as caught, device_errors():
        raise raised
    assert type(caught.value) is kind
    assert str(raised) in caught.value.message
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
        "Expected all tensors to be on the same device, but found cuda:0 and cpu",
        "the size of tensor a (3) must match the size of tensor b (4)",
    ],
)
def test_a_mistake_of_ours_stays_what_it_is(text: str) -> None:
    error = RuntimeError(text)
    assert device_error(error) is None
    with pytest.raises(RuntimeError) as caught, device_errors():
        raise error
    assert caught.value is error


def test_errors_that_are_not_pytorchs_pass() -> None:
    with pytest.raises(ValueError, match="CUDA error"), device_errors():
        raise ValueError("CUDA error: not said by the device")
