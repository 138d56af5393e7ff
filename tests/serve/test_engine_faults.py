"""Errors of a device become ours wherever they surface, which on a GPU is where a result is first waited for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from causal_forcing.config import VaeConfig
from causal_forcing.errors import DeviceFault, NonFiniteOutput, OutOfMemory
from causal_forcing.geometry import Geometry
from causal_forcing.vae import WanVae
from serve import model_engines
from serve.messages import PackedTensor
from serve.model_engines import ModelDecoder, ModelGenerator, ModelSession, ModelStream, ModelText


def failing(error: Exception) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def with_engine(kind: type[Any], **parts: Any) -> Any:
    """Return an adapter around parts of a test's own."""
    adapter = object.__new__(kind)
    for name, part in parts.items():
        setattr(adapter, f"_{name}", part)
    return adapter


def test_a_device_without_room_for_a_session_is_out_of_memory() -> None:
    full = SimpleNamespace(new_session=failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.0 GiB")))
    with pytest.raises(OutOfMemory):
        with_engine(ModelGenerator, engine=full).open(None)


def test_a_kernel_that_failed_shows_when_its_result_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = torch.AcceleratorError("CUDA error: an illegal memory access")
    monkeypatch.setattr(model_engines, "_packed", failing(fault))
    made = SimpleNamespace(generate_chunk=lambda **_: None, start_from=lambda _: None, rebuilds=0)
    session = with_engine(ModelSession, session=made)
    with pytest.raises(DeviceFault):
        session.generate(lambda: False)
    with pytest.raises(DeviceFault):
        session.start_from(PackedTensor.pack(torch.zeros(1, 16, 1, 2, 2)))


def test_a_library_that_fails_in_decoder_or_text_encoder_is_a_device_fault() -> None:
    broken = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
    vae = SimpleNamespace(new_decoder_state=failing(broken), decode=failing(broken))
    with pytest.raises(DeviceFault):
        with_engine(ModelDecoder, vae=vae).open(16, 16)
    state = WanVae(VaeConfig(base_dim=4)).new_decoder_state(Geometry(16, 16))
    with pytest.raises(DeviceFault):
        with_engine(ModelStream, vae=vae, state=state).decode(PackedTensor.pack(torch.zeros(1, 16, 1, 2, 2)))
    with pytest.raises(DeviceFault):
        with_engine(ModelText, encoder=SimpleNamespace(encode=failing(broken))).encode(["a fox"])


def test_an_embedding_that_is_not_finite_is_refused() -> None:
    nan = SimpleNamespace(key="k", embeds=torch.full((1, 4, 4), float("nan")))
    with pytest.raises(NonFiniteOutput):
        with_engine(ModelText, encoder=SimpleNamespace(encode=lambda _: [nan])).encode(["a fox"])
