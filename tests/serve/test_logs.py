"""Which session a log record is about, in every deployment; and that no record holds a prompt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest

from causal_forcing.errors import DeviceFault, InvalidRequest
from serve.access.config import LogConfig
from serve.codecs.frames import Codec, FrameFormat
from serve.device import Warden
from serve.generator import GeneratorService
from serve.logs import LOGGER, FieldsFilter, bind, set_up
from serve.messages import DecodeRequest, Encoded, EncodeImage, PackedEmbedding, Process
from serve.simulated import SimulatedDecoder
from serve.status import Failure
from serve.text_encoder import TextEncoder
from serve.vae_decoder import DecoderService, VaeDecoder
from tests.serve.fakes import ScriptedEngine, chunk, embedding, simulated
from tests.serve.test_generator import Bench, Reports

PRIVATE = "a very private prompt"
MODEL = simulated().model_key


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(LOGGER, "propagate", True)
    set_up(LogConfig(format="json"))
    with caplog.at_level(logging.DEBUG, "ray.serve"):
        yield caplog
    for added in [known for known in LOGGER.filters if isinstance(known, FieldsFilter)]:
        LOGGER.removeFilter(added)


def sessions(log: pytest.LogCaptureFixture) -> list[str]:
    """Return whose the records are."""
    return [getattr(record, "session_id", "") for record in log.records]


class FailingText:
    """A text encoder that cannot encode one text."""

    def encode(self, texts: Sequence[str]) -> list[PackedEmbedding]:
        for text in texts:
            if text == PRIVATE:
                raise KeyError(f"no such token in {text}")
            if not text:
                raise InvalidRequest("prompt", PRIVATE, "must be text", reason="INVALID_PROMPT")
        return [embedding(text) for text in texts]


def encoder(together: int) -> TextEncoder:
    """Return a text encoder that waits for so many texts, as Serve's batching does."""
    made: Any = object.__new__(TextEncoder)
    made._engine, made._model, made._process = FailingText(), MODEL, Process("t1", 1, "node")
    texts, encoded = list[str](), asyncio.get_running_loop().create_future()

    async def batch(text: str) -> object:
        place = len(texts)
        texts.append(text)
        if len(texts) == together:
            encoded.set_result(made._encode_all(texts))
        return (await encoded)[place]

    made.encode_batch = batch
    return made  # type: ignore[no-any-return]


async def test_prompts_that_are_encoded_together_fail_alone_each_under_its_sessions_name(
    log: pytest.LogCaptureFixture,
) -> None:
    asked = (("a fox", "good"), (PRIVATE, "bad"), ("", "worse"))
    texts = encoder(len(asked))
    calls = [asyncio.create_task(texts.encode(text, MODEL, name)) for text, name in asked]
    good, bad, worse = await asyncio.gather(*calls)
    assert isinstance(good, Encoded)
    assert isinstance(bad, Failure)
    assert isinstance(worse, Failure)
    assert [(answer.code, answer.reason) for answer in (bad, worse)] == [
        ("INTERNAL", "UNEXPECTED"),
        ("INVALID_ARGUMENT", "INVALID_PROMPT"),
    ]
    assert sorted(sessions(log)) == ["bad", "worse"]
    assert bad.error_id in log.text
    assert PRIVATE not in log.text
    assert PRIVATE not in str(bad)


async def test_a_generators_records_name_the_session(log: pytest.LogCaptureFixture) -> None:
    bench = Bench(engine=ScriptedEngine([None, DeviceFault("cuda")]))
    service = GeneratorService(bench.engine, bench.worker, "g1", Reports())
    bench.prompt(PRIVATE)
    async with aclosing(service.lease(bench.request)) as events:
        async for _ in events:
            pass
    assert "replaced" in log.text
    assert sessions(log) == ["s", "s"], "the error, and that the replica is to be replaced"
    assert PRIVATE not in log.text


def decoder(monkeypatch: pytest.MonkeyPatch) -> VaeDecoder:
    """Return a decoder without Serve around it, which cannot decode anything."""
    service = DecoderService(SimulatedDecoder(simulated()), "d1", 1 << 30, Warden(ThreadPoolExecutor(1), 60.0))
    made: Any = object.__new__(VaeDecoder)
    made._service, made._model = service, MODEL

    async def fail(*_: object) -> None:
        raise KeyError("something unexpected")

    monkeypatch.setattr(service, "_frames", fail)
    return made  # type: ignore[no-any-return]


async def test_a_decoders_records_name_the_session(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    frames = decoder(monkeypatch)
    form = FrameFormat(Codec.RAW_RGB24)
    request = DecodeRequest("", "one", 0, chunk(0).latents, True, 16, 16, form, model=MODEL)
    image = EncodeImage(b"not an image", 16, 16, model=MODEL, session_id="two")
    for answer, reason in (
        (await asyncio.create_task(frames.decode(request)), "UNEXPECTED"),
        (await asyncio.create_task(frames.encode_image(image)), "INVALID_IMAGE"),
    ):
        assert isinstance(answer, Failure)
        assert answer.reason == reason
        assert answer.error_id in log.text
    assert sessions(log) == ["one", "two"]


async def test_text_records_end_with_their_fields(log: pytest.LogCaptureFixture) -> None:
    set_up(LogConfig(format="text"))

    async def say() -> None:
        bind(session_id="s", tenant="")
        LOGGER.info("it costs %d %%", 7)

    await asyncio.create_task(say())
    LOGGER.info("of nobody")
    assert [record.getMessage() for record in log.records] == ["it costs 7 % [session_id=s]", "of nobody"]
