"""The gateway's side of decoding: which decoder, and what a new one is told."""

from __future__ import annotations

import numpy as np
import pytest

from serve.codecs.frames import EncodedFrame, FrameFormat
from serve.errors import Unavailable
from serve.gateway.decoding import DecoderLink
from serve.gateway.memory import SessionMemory
from serve.messages import CloseDecoder, Decoded, DecodeRequest, GeneratedChunk
from tests.serve.fakes import chunk, latents, simulated


class ScriptedDecoder:
    """Answers from a list of replica ids; a leading `-` is NEED_PRIME."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)
        self.requests: list[DecodeRequest] = []
        self.closed: list[str] = []

    async def decode(self, request: DecodeRequest) -> Decoded:
        self.requests.append(request)
        answer = self._answers.pop(0)
        return Decoded(answer.removeprefix("-"), None if answer.startswith("-") else (EncodedFrame(b"frame"),))

    async def close_decoder(self, request: CloseDecoder) -> None:
        self.closed.append(request.replica_id)


class Session:
    """Commits chunks and has them decoded, as a gateway's session does."""

    def __init__(self, decoder: ScriptedDecoder) -> None:
        config = simulated().model_preset.session_config(height=16, width=16)
        self._memory = SessionMemory(config)
        self._link = DecoderLink(decoder, "s", self._memory, FrameFormat())  # type: ignore[arg-type]
        self.close = self._link.close

    async def decode(self, made: GeneratedChunk) -> None:
        self._memory.commit(made)
        await self._link.decode(made)


def link(decoder: ScriptedDecoder) -> Session:
    return Session(decoder)


async def test_a_session_stays_at_its_decoder() -> None:
    decoder = ScriptedDecoder("d1", "d1")
    session = link(decoder)
    for index in range(2):
        await session.decode(chunk(index))
    await session.close()
    assert [request.replica_id for request in decoder.requests] == ["", "d1"]
    assert all(request.history is None for request in decoder.requests)
    assert decoder.closed == ["d1"]


async def test_a_decoder_without_the_cache_gets_the_latents_before_the_chunk() -> None:
    decoder = ScriptedDecoder("d1", "d1", "-d2", "d2", "d2")
    session = link(decoder)
    for index in range(4):
        await session.decode(chunk(index))
    primed = decoder.requests[3]
    assert (primed.chunk_index, primed.replica_id) == (2, "d2")
    assert primed.history is not None
    assert list(primed.history.data[0, 0, :, 0, 0]) == [0, 1]
    assert np.array_equal(primed.latents.data, latents([2]).data)
    assert decoder.requests[4].replica_id == "d2"
    assert decoder.requests[4].history is None


async def test_a_cache_that_is_lost_again_and_again_ends_the_session() -> None:
    session = link(ScriptedDecoder("d1", "-d2", "-d3", "-d4"))
    await session.decode(chunk(0))
    with pytest.raises(Unavailable) as caught:
        await session.decode(chunk(1))
    assert caught.value.reason == "DECODER_LOST"
