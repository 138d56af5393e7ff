"""The gateway's side of decoding: which decoder, and what a new one is told."""

from __future__ import annotations

import numpy as np
import pytest

from serve.decoding import DecoderLink, LatentHistory
from serve.errors import Unavailable
from serve.frames import EncodedFrame, FrameFormat
from serve.messages import CloseDecoder, Decoded, DecodeRequest
from tests.serve.fakes import chunk, latents


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


def link(decoder: ScriptedDecoder) -> DecoderLink:
    return DecoderLink(decoder, "s", (16, 16), FrameFormat())  # type: ignore[arg-type]


def test_the_history_keeps_the_last_frames_of_the_scene() -> None:
    history = LatentHistory(frames=3)
    assert history.latents() is None
    history.append(latents([1, 2]), starts_scene=True)
    history.append(latents([3, 4]), starts_scene=False)
    kept = history.latents()
    assert kept is not None
    assert list(kept.data[0, 0, :, 0, 0]) == [2, 3, 4]
    history.append(latents([9]), starts_scene=True)
    kept = history.latents()
    assert kept is not None
    assert list(kept.data[0, 0, :, 0, 0]) == [9]


def test_the_history_does_not_hold_on_to_what_it_was_given() -> None:
    given = latents([1])
    history = LatentHistory()
    history.append(given, starts_scene=True)
    given.data[:] = 7
    kept = history.latents()
    assert kept is not None
    assert kept.data[0, 0, 0, 0, 0] == 1


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
