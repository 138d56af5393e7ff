"""How a session keeps pace with its client: pauses, drops, keyframes, start images, videos of a given length."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import av
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from PIL import Image

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.codecs.frames import Codec, Pixels, decode_frame
from serve.gateway.inputs import OneRequest
from serve.gateway.session import LiveSession
from serve.simulated import mark
from tests.serve.fakes import Client, Clock, FakeBackends, kinds, open_session, play, simulated

Heard = list[pb.StreamVideoResponse]
QUICK = {"pacing": "PACING_REALTIME", "frames_per_second": 60}
DROPPING = {**QUICK, "slow_client_policy": "SLOW_CLIENT_POLICY_DROP_TO_LATEST"}
H264 = {"codec": "FRAME_CODEC_H264_ANNEXB"}


async def run(
    client: Client,
    backends: FakeBackends,
    on_message: Callable[[pb.StreamVideoResponse], None],
    clock: Callable[[], float] = time.monotonic,
) -> Heard:
    async with asyncio.timeout(20):
        return await play(open_session(backends, client, clock=clock), client, on_message)


def acking(client: Client, then: Callable[[int], None]) -> Callable[[pb.StreamVideoResponse], None]:
    """Ack every chunk, and tell its index."""

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            client.ack(message.frame.chunk_index)
            then(message.frame.chunk_index)

    return on_message


def ends_at(client: Client, chunk: int) -> Callable[[int], None]:
    return lambda index: client.send(end=pb.End()) if index == chunk else None


def frames_of(heard: Heard) -> list[pb.VideoFrame]:
    return [message.frame for message in heard if message.HasField("frame")]


def raw(frame: pb.VideoFrame) -> Pixels:
    return decode_frame(Codec.RAW_RGB24, frame.data, 64, 64)


async def test_a_paused_session_rests_after_the_chunks_under_way_and_goes_on() -> None:
    client, backends = Client(), FakeBackends()
    client.config()
    heard: Heard = []
    async with asyncio.timeout(20), aclosing(open_session(backends, client).messages()) as messages:
        async for message in messages:
            heard.append(message)
            if message.frame.last_in_chunk:
                if message.frame.chunk_index == 3:
                    client.send(pause=pb.Pause())
                client.ack(message.frame.chunk_index)
                if message.frame.chunk_index >= 3:
                    break
        client.send(ping=pb.Ping(nonce=1))
        resting = 0
        while resting < 20:  # nothing but the answers to pings comes any more
            message = await anext(messages)
            heard.append(message)
            if message.HasField("pong"):
                resting += 1
                client.send(ping=pb.Ping(nonce=1))
            elif message.HasField("frame"):
                resting = 0
                if message.frame.last_in_chunk:
                    client.ack(message.frame.chunk_index)
            await backends.idle()  # they make what they may
        last = frames_of(heard)[-1].chunk_index
        assert last <= 3 + 2
        client.send(resume=pb.Resume())
        async for message in messages:
            if message.HasField("frame"):
                assert message.frame.chunk_index == last + 1
                client.half_close()
                break
        await anext(messages)
    assert backends.is_clean


async def test_a_pause_has_a_longest_length() -> None:
    client, backends = Client(), FakeBackends(simulated(limits={"pause_timeout_s": 0.05}))
    client.config()
    heard = await run(client, backends, acking(client, lambda _: client.send(pause=pb.Pause())))
    assert heard[-1].session_ended.reason == pb.END_REASON_PAUSE_TIMEOUT
    assert backends.is_clean


async def test_a_paused_client_owes_no_ack() -> None:
    limits = {"pause_timeout_s": 300, "stall_timeout_s": 60}
    client, backends, clock = Client(), FakeBackends(simulated(limits=limits)), Clock()
    client.config(credit_chunks=1)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:  # which is not acked
            client.send(pause=pb.Pause())
            client.send(ping=pb.Ping())
        if message.HasField("pong"):
            clock.now_s += 300
            client.send(resume=pb.Resume())

    heard = await run(client, backends, on_message, clock)
    assert heard[-1].session_ended.reason == pb.END_REASON_PAUSE_TIMEOUT


async def test_the_end_of_the_longest_session_is_announced() -> None:
    limits = {"max_session_s": 3600, "ending_notice_s": 30, "silence_timeout_s": 9000, "stall_timeout_s": 9000}
    client, backends, clock = Client(), FakeBackends(simulated(limits=limits)), Clock()
    client.config(credit_chunks=1)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            clock.now_s += 3575
            client.send(pause=pb.Pause())  # after which the session looks at the clock
        if message.HasField("session_ending"):
            clock.now_s += 25
            client.send(resume=pb.Resume())

    heard = await run(client, backends, on_message, clock)
    assert [m.session_ending.remaining.seconds for m in heard if m.HasField("session_ending")] == [25]
    assert heard[-1].session_ended.reason == pb.END_REASON_MAX_DURATION
    assert heard[-1].session_ended.duration.seconds == 3600


async def test_a_client_without_credit_misses_whole_chunks_and_is_told_which() -> None:
    client, backends = Client(), FakeBackends()
    client.config(credit_chunks=2, **DROPPING, codec="FRAME_CODEC_RAW_RGB24")
    heard: Heard = []
    async with asyncio.timeout(20), aclosing(open_session(backends, client).messages()) as messages:
        async for message in messages:
            heard.append(message)
            if message.frame.last_in_chunk and message.frame.chunk_index == 1:
                break  # and do not ack
        entry = await eventually_decoded(backends, 5)
        client.ack(1)
        async for message in messages:
            heard.append(message)
            if message.frame.last_in_chunk:
                client.half_close()
    dropped = [message.frames_dropped for message in heard if message.HasField("frames_dropped")]
    assert len(dropped) >= 1
    first = dropped[0]
    assert (first.first_chunk_index, first.first_frame_index) == (2, 5)
    assert first.chunk_count >= entry - 2
    assert first.frame_count == 4 * first.chunk_count
    frames = frames_of(heard)
    after = next(frame for frame in frames if frame.chunk_index > 1)
    assert after.chunk_index == first.first_chunk_index + first.chunk_count
    assert after.frame_index == first.first_frame_index + first.frame_count
    assert raw(after)[0, 0, 1] == mark(after.chunk_index)
    assert [message.sequence for message in heard] == list(range(len(heard)))
    ended = heard[-1].session_ended
    assert ended.dropped_frame_count == sum(entry.frame_count for entry in dropped)
    assert ended.frame_count == len(frames)
    assert backends.is_clean


async def eventually_decoded(backends: FakeBackends, chunk: int) -> int:
    """Return when the decoder has come to a chunk; the session goes on without its client."""
    while True:
        entry = backends.decoder.cache.find("session-1", 0.0)
        if entry is not None and (entry.next_chunk or 0) > chunk:
            return entry.next_chunk or 0
        await asyncio.sleep(0.005)


async def test_after_a_drop_h264_goes_on_with_a_keyframe_and_every_frame_decodes() -> None:
    client, backends = Client(), FakeBackends()
    client.config(credit_chunks=1, **DROPPING, **H264)
    heard: Heard = []
    async with asyncio.timeout(20), aclosing(open_session(backends, client).messages()) as messages:
        acked = 0
        async for message in messages:
            heard.append(message)
            if message.frame.last_in_chunk:
                if not acked:
                    await eventually_decoded(backends, 3)
                if acked == 3:
                    client.half_close()
                else:
                    client.ack(message.frame.chunk_index)
                acked += 1
    frames = frames_of(heard)
    dropped = [message.frames_dropped for message in heard if message.HasField("frames_dropped")]
    assert dropped[0].first_chunk_index == 1
    after = next(frame for frame in frames if frame.chunk_index > 0)
    assert after.keyframe
    assert after.frame_index == 1 + dropped[0].frame_count
    assert after.data[:5] == b"\x00\x00\x00\x01\x67"  # its parameter sets come first
    start = frames.index(after)
    assert len(decoded(b"".join(frame.data for frame in frames[start:]))) == len(frames) - start
    assert len(decoded(b"".join(frame.data for frame in frames))) == len(frames)


def decoded(stream: bytes) -> list[Pixels]:
    """Return the pictures of a file in memory."""
    with av.open(io.BytesIO(stream)) as container:
        return [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]


async def test_a_prompt_that_takes_effect_in_a_dropped_chunk_is_told() -> None:
    client, backends = Client(), FakeBackends()
    client.config(credit_chunks=1, **DROPPING)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            client.prompt("snow", prompt_id="snow")
        if message.prompt_applied.prompt_id == "snow":
            client.half_close()

    heard = await run(client, backends, on_message)
    applied = next(m.prompt_applied for m in heard if m.prompt_applied.prompt_id == "snow")
    assert kinds(heard)[-2:] == ["frames_dropped", "session_ended"]
    dropped = heard[-2].frames_dropped
    assert dropped.first_chunk_index <= applied.chunk_index < dropped.first_chunk_index + dropped.chunk_count


async def test_a_client_that_never_acks_is_ended_although_its_frames_are_dropped() -> None:
    client, backends = Client(), FakeBackends(simulated(limits={"stall_timeout_s": 0.2}))
    client.config(**DROPPING)
    heard = await run(client, backends, lambda _: None)
    assert heard[-1].error.reason == "CLIENT_TOO_SLOW"
    assert backends.is_clean


@pytest.mark.parametrize("codec", ["FRAME_CODEC_H264_ANNEXB", "FRAME_CODEC_H264_FMP4"])
async def test_h264_is_playable_and_keyframes_come_when_asked_for(codec: str) -> None:
    client, backends = Client(), FakeBackends()
    client.config(codec=codec, credit_chunks=1, h264_keyframe_interval_frames=600)

    def then(chunk: int) -> None:
        if chunk == 3:
            client.send(request_keyframe=pb.RequestKeyframe())
        if chunk == 6:
            client.half_close()

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:  # ask first, ack then: the next chunk to be encoded is the one asked for
            then(message.frame.chunk_index)
            client.ack(message.frame.chunk_index)

    frames = frames_of(await run(client, backends, on_message))
    assert [frame.frame_index for frame in frames if frame.keyframe] == [0, 13]
    assert [bool(frame.init_segment) for frame in frames] == [
        codec.endswith("FMP4") and index == 0 for index in range(len(frames))
    ]
    pictures = decoded(b"".join(frame.init_segment + frame.data for frame in frames))
    assert len(pictures) == len(frames)
    green = [int(picture[32, 32, 1]) for picture in pictures]
    assert all(abs(value - frame.chunk_index) <= 6 for value, frame in zip(green, frames, strict=True))


async def test_a_lost_decoder_cache_starts_the_encoder_anew() -> None:
    client, backends = Client(), FakeBackends()
    client.config(**H264, h264_keyframe_interval_frames=600)

    def then(chunk: int) -> None:
        if chunk == 2:
            backends.decoder.cache.drop("session-1")
        if chunk == 5:
            client.half_close()

    frames = frames_of(await run(client, backends, acking(client, then)))
    anew = [frame for frame in frames if frame.keyframe]
    assert len(anew) == 2
    assert anew[1].chunk_index in {3, 4, 5}
    assert anew[1].data[:5] == b"\x00\x00\x00\x01\x67"
    assert len(decoded(b"".join(frame.data for frame in frames))) == len(frames)


def picture(colour: tuple[int, int, int], kind: str = "PNG", size: tuple[int, int] = (120, 90)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


async def test_a_video_starts_from_the_image_that_was_sent() -> None:
    client, backends = Client(), FakeBackends()
    client.config(start_image=picture((200, 100, 50)), codec="FRAME_CODEC_RAW_RGB24")
    heard = await run(client, backends, acking(client, ends_at(client, 2)))
    frames = frames_of(heard)
    assert tuple(raw(frames[0])[5, 5]) == (200, 100, 50)
    assert (frames[0].chunk_index, frames[0].prompt_id) == (0, "first")
    assert tuple(raw(frames[1])[5, 5])[:2] == (mark(1), 1)
    assert not heard[1].session_started.effective_config.start_image


async def test_a_damaged_image_is_refused_by_name_and_takes_no_generator() -> None:
    client, backends = Client(), FakeBackends(places_script=[])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    client.config(start_image=buffer.getvalue()[:-2000])
    heard = await run(client, backends, lambda _: None)
    assert (heard[-1].error.reason, heard[-1].error.status.code) == ("INVALID_IMAGE", 3)
    assert backends.running == 0
    assert backends.is_clean


async def test_each_chunk_tells_where_its_time_went() -> None:
    service = simulated(simulated={"chunk_ms": 8, "decode_ms": 4, "encode_ms": 20})
    client, backends = Client(), FakeBackends(service)
    client.config()

    def then(chunk: int) -> None:
        if chunk == 1:
            client.prompt("snow")
        if chunk == 6:
            client.half_close()

    frames = frames_of(await run(client, backends, acking(client, then)))
    lasts = [frame for frame in frames if frame.last_in_chunk]
    for frame in lasts:
        assert frame.timings.denoise.ToNanoseconds() >= 8e6
        assert frame.timings.decode.ToNanoseconds() >= 4e6
        assert frame.timings.encode.ToNanoseconds() > 0
        assert frame.timings.queue.ToNanoseconds() > 0
    told = [frame.prompt_id for frame in lasts if frame.timings.text.ToNanoseconds()]
    assert told == ["first", "prompt-1"]
    assert all(f.timings.text.ToNanoseconds() >= 20e6 for f in lasts if f.timings.text.ToNanoseconds())


async def test_memory_of_a_session_is_bounded_and_told() -> None:
    backends = FakeBackends(simulated(simulated={"chunk_ms": 0, "frame_bytes": 100_000}))
    client = Client()
    client.config(credit_chunks=3)
    session = open_session(backends, client)
    async with asyncio.timeout(20), aclosing(session.messages()) as messages:
        async for message in messages:
            if message.frame.last_in_chunk and message.frame.chunk_index == 2:
                break
            if message.HasField("session_started"):
                await eventually_decoded(backends, 2)  # everything that may be sent waits to be taken
                latents = 3 * 16 * 8 * 8 * 2
                assert session.nbytes == pytest.approx(9 * 100_000 + latents, rel=0.01)
        assert session.nbytes < 10_000


def generate(backends: FakeBackends, seconds: float, **fields: Any) -> LiveSession:
    prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="a fox")])
    length = Duration()
    length.FromNanoseconds(round(seconds * 1e9))
    config = pb.SessionConfig(prompt=prompt, **{"seed": 1, "frames_per_second": 60, **fields})
    request = pb.GenerateVideoRequest(config=config, duration=length)
    return LiveSession("session-1", backends.service, backends, OneRequest(request, backends.service))


async def all_of(session: LiveSession) -> Heard:
    async with asyncio.timeout(20), aclosing(session.messages()) as messages:
        return [message async for message in messages]


async def test_a_video_of_a_given_length_comes_without_acks_and_ends() -> None:
    backends = FakeBackends(simulated(limits={"silence_timeout_s": 0.05}))
    heard = await all_of(generate(backends, 0.5))
    frames = frames_of(heard)
    assert len(frames) == 33  # the first chunk has one frame, every other four: the first number that is not below 30
    assert heard[-1].session_ended.reason == pb.END_REASON_COMPLETE
    assert [message.sequence for message in heard] == list(range(len(heard)))
    started = heard[1].session_started.effective_config
    assert not started.HasField("credit_chunks")
    assert started.slow_client_policy == pb.SLOW_CLIENT_POLICY_UNSPECIFIED
    assert backends.is_clean


async def test_a_generated_video_has_a_limit_of_bytes() -> None:
    limits = {"max_generate_bytes": 1 << 20}
    backends = FakeBackends(simulated(limits=limits, simulated={"chunk_ms": 0, "frame_bytes": 100_000}))
    heard = await all_of(generate(backends, 2.0))
    ended = heard[-1].session_ended
    assert ended.reason == pb.END_REASON_COMPLETE
    assert ended.byte_count == 900_000  # chunks of 100, 400, 400 kB; another one would be too much
    assert backends.is_clean


async def test_a_reader_that_vanished_unseen_costs_no_more_than_the_length_of_its_video() -> None:
    backends = FakeBackends()
    messages = generate(backends, 0.2).messages()
    await anext(messages)  # then nobody reads, and no cancel comes
    async with asyncio.timeout(20):
        await backends.leaving.wait()
    assert not backends.running
    await messages.aclose()
    assert backends.is_clean


async def test_a_cancelled_reader_frees_the_generator_at_once() -> None:
    backends = FakeBackends()
    async with asyncio.timeout(20), aclosing(generate(backends, 60.0).messages()) as messages:
        async for message in messages:
            if message.HasField("frame"):
                break
    assert backends.is_clean


@pytest.mark.parametrize(
    ("seconds", "fields", "field"),
    [
        (0.0, {}, "duration"),
        (61.0, {}, "duration"),
        (1.0, {"credit_chunks": 2}, "credit_chunks"),
        (1.0, {"slow_client_policy": "SLOW_CLIENT_POLICY_LOSSLESS"}, "slow_client_policy"),
        (1.0, {"pacing": "PACING_AS_FAST_AS_POSSIBLE"}, "pacing"),
    ],
)
async def test_what_a_generated_video_cannot_have_is_refused_by_name(
    seconds: float, fields: dict[str, Any], field: str
) -> None:
    backends = FakeBackends()
    (only,) = await all_of(generate(backends, seconds, **fields))
    assert only.error.status.code == 3
    assert f"{field}: got" in only.error.status.message
    assert backends.events == []


@pytest.mark.parametrize("kind", [field.name for field in pb.StreamVideoRequest.DESCRIPTOR.oneofs[0].fields])
async def test_what_follows_the_end_is_not_read(kind: str) -> None:
    client, backends = Client(), FakeBackends()
    client.config()
    client.send(end=pb.End())
    client.send(**{kind: type(getattr(pb.StreamVideoRequest(), kind))()})
    heard = await run(client, backends, lambda _: None)
    assert heard[-1].session_ended.reason == pb.END_REASON_CLIENT
    assert backends.is_clean
