"""The real engine behind the generator: what it compiles before it is ready, and what it says of its start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from causal_forcing.compile import compile_transformer
from causal_forcing.engine import Engine
from causal_forcing.transformer import CausalTransformer
from serve.config import ServiceConfig, load_config
from serve.engines import WARM_UP, load_generator
from serve.logs import LOGGER
from serve.messages import PackedEmbedding, PackedTensor

SIZES = [[32, 32], [32, 48]]


@pytest.fixture
def _only_tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile without generating code, and one block for all: both would take minutes and change nothing here."""

    def trace(transformer: CausalTransformer) -> None:
        compile_transformer(transformer, backend="eager", by_block=True)

    torch.compiler.reset()
    monkeypatch.setattr("causal_forcing.engine.compile_transformer", trace)
    yield
    torch.compiler.reset()


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    return caplog


def first_chunks(service: ServiceConfig, engine: Any, size: list[int], count: int) -> None:
    height, width = size
    session = engine.open(service.model_preset.session_config(height=height, width=width))
    sizes = service.model_preset.transformer
    blank = PackedTensor(np.zeros((1, sizes.text_len, sizes.text_dim), np.float32), "float32")
    session.update_prompt(WARM_UP, [PackedEmbedding("blank", blank)])
    for _ in range(count):
        assert session.generate(lambda: False) is not None


@pytest.mark.slow
@pytest.mark.usefixtures("_only_tracing")
def test_every_allowed_size_is_compiled_before_a_replica_is_ready(logged: pytest.LogCaptureFixture) -> None:
    service = load_config(None, sizes=SIZES, generator={"compile": True})
    engine = load_generator(service)
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in SIZES:
            first_chunks(service, engine, size, 11)  # the window of 9, and beyond it
    assert "compiling: 10 of 10 chunks" in logged.text
    ready = next(record.getMessage() for record in logged.records if "cold start" in record.getMessage())
    assert [phase in ready for phase in ("import", "load", "compile", "first chunk")] == [True] * 4


def test_what_is_configured_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def load(*_args: object, **options: Any) -> Engine:
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr(Engine, "load", load)
    quantised = {"quantization": "fp8_e4m3fn", "num_gpus": 1}
    service = load_config(None, device="cuda", generator=quantised, sizes=SIZES, max_window_frames=6)
    with pytest.raises(InterruptedError):
        load_generator(service)
    assert (given["quantization"], given["compiled"]) == ("fp8_e4m3fn", False)
    assert given["session"] == service.session_config()
    assert (given["session"].window_frames, given["session"].width) == (6, 32)
