"""Temporal caches: idempotent, primed exactly, within their bytes, and never wrong."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from causal_forcing.config import VaeConfig
from causal_forcing.geometry import Geometry
from causal_forcing.media import from_frames, to_frames
from causal_forcing.vae import WanVae
from serve.codecs.frames import Codec, FrameFormat, Pixels, decode_frame
from serve.device import Warden
from serve.messages import Decoded, DecodeRequest, EncodeImage, PackedTensor
from serve.metrics import MemorySink, Recorder
from serve.model_engines import ModelStream
from serve.vae_decoder import IDLE_S, DecoderCache, DecoderService

SIZE = 16


class TinyDecoder:
    """A real Wan decoder of very small width, with seeded weights."""

    min_frame_bytes = 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.vae = WanVae(VaeConfig(base_dim=4)).eval()

    def open(self, height: int, width: int) -> ModelStream:
        return ModelStream(self.vae, self.vae.new_decoder_state(Geometry(height, width)))

    def encode_image(self, frame: Pixels) -> PackedTensor:
        return PackedTensor.pack(self.vae.encode(from_frames(frame[None])))


ENGINE = TinyDecoder()
LATENTS = torch.randn(1, 16, 44, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(1))


def service(cache_bytes: int = 1 << 40, sink: MemorySink | None = None) -> DecoderService:
    return DecoderService(ENGINE, "d", cache_bytes, Warden(ThreadPoolExecutor(1), 60.0), Recorder(sink))


def request(index: int, session: str = "s", **fields: Any) -> DecodeRequest:
    latents = PackedTensor.pack(LATENTS[:, :, index : index + 1])
    raw = FrameFormat(Codec.RAW_RGB24)
    return replace(DecodeRequest("", session, index, latents, index == 0, SIZE, SIZE, raw), **fields)


def history(before: int) -> PackedTensor:
    return PackedTensor.pack(LATENTS[:, :, max(0, before - 38) : before])


def pixels(answer: Decoded) -> list[Pixels]:
    assert answer.frames is not None
    return [decode_frame(Codec.RAW_RGB24, frame.data, SIZE, SIZE) for frame in answer.frames]


@pytest.fixture(scope="module")
def expected() -> list[list[Pixels]]:
    state = ENGINE.vae.new_decoder_state(Geometry(SIZE, SIZE))
    with torch.inference_mode():
        return [list(to_frames(ENGINE.vae.decode(LATENTS[:, :, i : i + 1], state))) for i in range(LATENTS.shape[2])]


def same(got: list[Pixels], wanted: list[Pixels]) -> bool:
    return len(got) == len(wanted) and all(map(np.array_equal, got, wanted))


async def test_chunks_in_order_are_what_the_vae_decodes(expected: list[list[Pixels]]) -> None:
    decoder = service()
    for index in range(4):
        assert same(pixels(await decoder.decode(request(index))), expected[index])


async def test_the_last_chunk_can_be_asked_for_again() -> None:
    decoder = service()
    await decoder.decode(request(0))
    first = await decoder.decode(request(1))
    assert await decoder.decode(request(1)) == first
    assert (await decoder.decode(request(2))).frames is not None


@pytest.mark.parametrize("index", [1, 5, 41])
async def test_an_unknown_session_is_primed_to_exactly_the_same_pixels(
    index: int, expected: list[list[Pixels]]
) -> None:
    decoder = service()
    assert (await decoder.decode(request(index))).frames is None
    primed = await decoder.decode(request(index, history=history(index)))
    assert same(pixels(primed), expected[index])
    assert primed.prime_s > 0
    assert same(pixels(await decoder.decode(request(index + 1))), expected[index + 1])


async def test_a_skipped_chunk_is_never_decoded_with_the_wrong_cache(expected: list[list[Pixels]]) -> None:
    decoder = service()
    await decoder.decode(request(0))
    assert (await decoder.decode(request(2))).frames is None
    assert same(pixels(await decoder.decode(request(2, history=history(2)))), expected[2])


async def test_a_scene_begins_fresh(expected: list[list[Pixels]]) -> None:
    decoder = service()
    for index in range(3):
        await decoder.decode(request(index))
    again = request(0, chunk_index=3, starts_scene=True)
    assert same(pixels(await decoder.decode(again)), expected[0])


async def test_sessions_are_isolated(expected: list[list[Pixels]]) -> None:
    decoder = service()
    for index in range(3):
        answers = await asyncio.gather(*(decoder.decode(request(index, session=name)) for name in "abc"))
        assert all(same(pixels(answer), expected[index]) for answer in answers)
    assert len(decoder.cache) == 3


async def test_a_cancelled_call_is_followed_by_the_right_pixels(expected: list[list[Pixels]]) -> None:
    decoder = service()
    await decoder.decode(request(0))
    call = asyncio.create_task(decoder.decode(request(1)))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    answer = await decoder.decode(request(1))
    if answer.frames is None:
        answer = await decoder.decode(request(1, history=history(1)))
    assert same(pixels(answer), expected[1])


async def test_a_full_cache_gives_up_the_longest_unused_and_recovers(expected: list[list[Pixels]]) -> None:
    one = ENGINE.open(SIZE, SIZE).nbytes
    decoder = service(cache_bytes=2 * one + 20_000)
    for name in "abc":
        await decoder.decode(request(0, session=name))
    assert len(decoder.cache) == 2
    assert (await decoder.decode(request(1, session="c"))).frames is not None
    assert (await decoder.decode(request(1, session="a"))).frames is None
    primed = await decoder.decode(request(1, session="a", history=history(1)))
    assert same(pixels(primed), expected[1])


def test_caches_of_sessions_whose_end_was_lost_go_away() -> None:
    cache = DecoderCache(1 << 40)
    cache.add("old", ENGINE.open(SIZE, SIZE), now_s=0.0)
    cache.add("new", ENGINE.open(SIZE, SIZE), now_s=IDLE_S + 1)
    assert len(cache) == 1
    assert cache.find("old", IDLE_S + 1) is None


async def test_a_chunk_that_nobody_sees_moves_the_cache_on_and_is_not_encoded(expected: list[list[Pixels]]) -> None:
    decoder = service()
    await decoder.decode(request(0))
    assert (await decoder.decode(request(1, encode=False))).frames == ()
    assert same(pixels(await decoder.decode(request(2))), expected[2])


def h264(index: int, **fields: Any) -> DecodeRequest:
    first_frame = 0 if index == 0 else 4 * index - 3
    return request(index, format=FrameFormat(Codec.H264_ANNEXB), first_frame=first_frame, **fields)


def keyframes(answer: Decoded) -> list[bool]:
    assert answer.frames is not None
    return [frame.keyframe for frame in answer.frames]


async def test_the_state_of_the_encoder_lives_and_dies_with_the_cache() -> None:
    decoder = service()
    assert keyframes(await decoder.decode(h264(0))) == [True]
    assert keyframes(await decoder.decode(h264(1))) == [False] * 4
    again = await decoder.decode(h264(1))
    assert keyframes(again) == [False] * 4
    assert keyframes(await decoder.decode(h264(2, keyframe=True))) == [True, False, False, False]
    decoder.cache.drop("s")
    assert (await decoder.decode(h264(3))).frames is None
    assert keyframes(await decoder.decode(h264(3, history=history(3)))) == [True, False, False, False]
    assert keyframes(await decoder.decode(h264(4, starts_scene=True))) == [True]


async def test_a_skipped_chunk_starts_the_encoder_anew() -> None:
    decoder = service()
    await decoder.decode(h264(0))
    assert keyframes(await decoder.decode(h264(2, history=history(2)))) == [True, False, False, False]


async def test_the_cache_counts_the_encoder() -> None:
    decoder = service()
    await decoder.decode(request(0, session="still"))
    await decoder.decode(h264(0, session="moving"))
    still, moving = (decoder.cache.find(name, 0.0) for name in ("still", "moving"))
    assert still is not None
    assert moving is not None
    assert moving.nbytes > still.nbytes + 1_000_000


async def test_a_start_image_becomes_the_latents_that_the_vae_makes_of_it() -> None:
    buffer = io.BytesIO()
    colour = np.random.default_rng(2).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(colour).save(buffer, "PNG")
    made = await service().encode_image(EncodeImage(buffer.getvalue(), SIZE, SIZE))
    with torch.inference_mode():
        wanted = ENGINE.vae.encode(from_frames(colour[None]))
    assert torch.equal(made.unpack(), wanted)


async def test_a_cache_that_grows_makes_room_for_itself() -> None:
    probe = service()
    await probe.decode(request(0))
    one = probe.cache.nbytes
    decoder = service(cache_bytes=2 * one)
    for name in "ab":
        await decoder.decode(request(0, session=name))
    assert len(decoder.cache) == 2
    await decoder.decode(request(1, session="a"))  # four frames instead of one
    assert (len(decoder.cache), decoder.cache.evictions) == (1, 1)
    assert decoder.cache.nbytes <= 2 * one


async def test_few_caches_are_made_anew_at_a_time_and_all_of_them_right(expected: list[list[Pixels]]) -> None:
    decoder = service()
    calls = (decoder.decode(request(5, session=name, history=history(5))) for name in "abcde")
    answers = await asyncio.gather(*calls)
    assert all(same(pixels(answer), expected[5]) for answer in answers)
    assert (decoder.counts.primed, decoder.counts.decoded, decoder.counts.missed) == (5, 5, 0)
    await decoder.decode(request(5, session="a"))
    assert (await decoder.decode(request(9, session="a"))).frames is None
    assert (decoder.counts.repeated, decoder.counts.missed) == (1, 1)


async def test_what_was_asked_of_a_decoder_is_recorded_once() -> None:
    sink = MemorySink()
    decoder = service(cache_bytes=0, sink=sink)
    await decoder.decode(request(0, session="a"))
    await decoder.decode(request(0, session="a"))
    await decoder.decode(request(0, session="b"))
    await decoder.decode(request(1, session="a"))
    for _ in range(2):
        decoder.look()
    calls = {result: sink.values["decoder_calls_total", result] for result in ("decoded", "repeated", "missed")}
    assert calls == {"decoded": 2, "repeated": 1, "missed": 1}
    assert sink.values["decoder_evictions_total",] == decoder.cache.evictions == 2
    assert sink.values["decoder_cached_sessions",] == 1
