"""The whole service with real processes: right frames, and nothing left behind whatever happens."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import av
import grpc
import numpy as np
import pytest
import torch

from causal_forcing.engine import Engine
from causal_forcing.media import to_frames
from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc
from serve.client import Ended, Event, Frame, Moved, PromptApplied, Queued, Started, VideoServiceError
from serve.codecs.frames import Pixels
from tests.serve.cluster.conftest import PATIENCE_S, SIZE, Cluster, collect

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.asyncio]

SEED = 1
FOX = PromptUpdate((WeightedPrompt("a red circle"),), prompt_id="first")
SNOW = PromptUpdate((WeightedPrompt("a blue square"),), prompt_id="second")


def in_process(switch_chunk: int | None, chunks: int) -> list[list[Pixels]]:
    """Return the frames that the engine makes in this process, with a switch before one chunk."""
    torch.set_num_threads(1)
    engine = Engine.load("tiny")
    session = engine.new_session(engine.session_config(height=SIZE, width=SIZE, seed=SEED))
    session.update_prompt(FOX)
    frames = []
    for index in range(chunks):
        if index == switch_chunk:
            session.update_prompt(SNOW)
        frames.append(list(to_frames(session.decode(session.generate_chunk()))))
    return frames


def same(got: dict[int, list[Pixels]], wanted: list[list[Pixels]]) -> bool:
    return all(len(got[i]) == len(w) and all(map(np.array_equal, got[i], w)) for i, w in enumerate(wanted))


async def first_frame(events: Callable[[], Awaitable[Event]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not isinstance(await events(), Frame):
            pass


async def test_frames_are_those_of_the_engine_bit_for_bit_across_a_prompt_switch(cluster: Cluster) -> None:
    events: list[Event] = []
    frames: dict[int, list[Pixels]] = {}
    async with asyncio.timeout(PATIENCE_S), cluster.session(FOX, seed=SEED) as session:
        async for event in session:
            events.append(event)
            if isinstance(event, Frame):
                frames.setdefault(event.chunk_index, []).append(event.pixels())
                if event.last_in_chunk and event.chunk_index == 2:
                    await session.update_prompt(SNOW)
                if event.last_in_chunk and event.prompt_id == "second":
                    last = event.chunk_index
                    await session.end()
    applied = [event for event in events if isinstance(event, PromptApplied)]
    assert [entry.prompt_id for entry in applied] == ["first", "second"]
    switch = applied[1].chunk_index
    assert switch >= 3
    firsts = [event for event in events if isinstance(event, Frame) and event.prompt_id == "second"]
    assert (firsts[0].chunk_index, firsts[0].frame_index) == (switch, applied[1].frame_index)
    assert isinstance(events[-1], Ended)
    assert same(frames, in_process(switch, last + 1))
    await cluster.until_free()


@pytest.mark.parametrize(
    ("fields", "field", "value", "allowed"),
    [
        ({"height": 480, "width": 832}, "height", "480x832", "must be one of 32x32, 64x64"),
        ({"denoising_steps": (500, 750)}, "denoising_steps", "(500, 750)", "strictly descending"),
        ({"credit_chunks": 99}, "credit_chunks", "99", "1 to 8"),
    ],
)
async def test_a_wrong_request_is_refused_by_field_value_and_what_is_allowed(
    cluster: Cluster, fields: dict[str, object], field: str, value: str, allowed: str
) -> None:
    async with cluster.session(**fields) as session:
        with pytest.raises(VideoServiceError) as caught:
            await anext(session)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.field == field
    assert value in caught.value.message
    assert allowed in caught.value.message
    await cluster.until_free()


@dataclass
class Raw:
    """A call as any gRPC client makes it."""

    channel: grpc.aio.Channel
    call: grpc.aio.StreamStreamCall

    @classmethod
    async def open(cls, cluster: Cluster, **fields: object) -> Raw:
        channel = grpc.aio.insecure_channel(cluster.address)
        call = video_pb2_grpc.VideoServiceStub(channel).StreamVideo()  # type: ignore[no-untyped-call]
        prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="a red circle")])
        config = pb.SessionConfig(prompt=prompt, height=SIZE, width=SIZE, codec="FRAME_CODEC_RAW_RGB24", **fields)
        await call.write(pb.StreamVideoRequest(config=config))
        return cls(channel, call)

    async def until_a_frame(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not (await self.call.read()).HasField("frame"):
                pass

    async def rest(self) -> list[pb.StreamVideoResponse]:
        messages = []
        async with asyncio.timeout(PATIENCE_S):
            while isinstance(message := await self.call.read(), pb.StreamVideoResponse):
                messages.append(message)
        return messages


@pytest.mark.parametrize("when", ["after a frame", "at once", "while it does not read"])
@pytest.mark.parametrize("how", ["cancel", "half-close", "disconnect"])
async def test_a_client_that_leaves_frees_the_generator(cluster: Cluster, how: str, when: str) -> None:
    raw = await Raw.open(cluster, credit_chunks=8)
    if when != "at once":
        await raw.until_a_frame()
    if when == "while it does not read":
        await asyncio.sleep(0.3)  # frames pile up in the connection
    if how == "cancel":
        raw.call.cancel()
    elif how == "half-close":
        await raw.call.done_writing()
        assert (await raw.rest())[-1].HasField("session_ended")
        assert await raw.call.code() is grpc.StatusCode.OK
    await raw.channel.close(None)
    await cluster.until_free()


async def test_a_second_session_waits_and_then_runs_and_a_full_queue_refuses(cluster: Cluster) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(cluster.session())
        await first_frame(first.__anext__)
        waiting = []
        for ahead in (0, 1):
            waiting.append(await stack.enter_async_context(cluster.session()))
            told = await anext(waiting[-1])
            assert isinstance(told, Queued)
            assert told.sessions_ahead == ahead
        refused = await stack.enter_async_context(cluster.session())
        with pytest.raises(VideoServiceError) as caught:
            await anext(refused)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_SESSION_SLOT")
        assert caught.value.retry_after_s is not None
        await first.end()
        await first_frame(waiting[0].__anext__)
    await cluster.until_free()


async def test_a_decoder_that_dies_does_not_show(cluster: Cluster) -> None:
    frames: dict[int, list[Pixels]] = {}
    async with asyncio.timeout(2 * PATIENCE_S), cluster.session(FOX, seed=SEED) as session:
        async for event in session:
            if isinstance(event, Frame):
                frames.setdefault(event.chunk_index, []).append(event.pixels())
                if event.last_in_chunk and event.chunk_index == 3:
                    cluster.kill("VaeDecoder")
                if event.last_in_chunk and event.chunk_index == 7:
                    break
    assert same(frames, in_process(None, 8))
    await cluster.until_free()


async def test_a_session_outlives_its_generator(cluster: Cluster) -> None:
    events: list[Event] = []
    async with asyncio.timeout(2 * PATIENCE_S), cluster.session(FOX, seed=SEED) as session:
        async for event in session:
            events.append(event)
            if isinstance(event, Frame) and event.last_in_chunk:
                if event.chunk_index == 3:
                    cluster.kill("Generator")
                if event.chunk_index == 5:
                    await session.update_prompt(SNOW)
                if event.prompt_id == "second":
                    await session.end()
    assert isinstance(events[-1], Ended)
    assert [event.reason for event in events if isinstance(event, Moved)] == ["GENERATOR_LOST"]
    frames = [event for event in events if isinstance(event, Frame)]
    assert [frame.frame_index for frame in frames] == list(range(len(frames)))
    moved = next(index for index, event in enumerate(events) if isinstance(event, Moved))
    before: dict[int, list[Pixels]] = {}
    for event in events[:moved]:
        if isinstance(event, Frame):
            before.setdefault(event.chunk_index, []).append(event.pixels())
    assert same(before, in_process(None, len(before)))
    await cluster.serves()


async def test_a_session_outlives_a_generator_that_is_frozen(cluster: Cluster) -> None:
    moved, after = list[Moved](), 0
    async with asyncio.timeout(2 * PATIENCE_S), cluster.session() as session:
        await first_frame(session.__anext__)
        with cluster.frozen("Generator") as process:
            async for event in session:
                if isinstance(event, Moved):
                    moved.append(event)
                after += isinstance(event, Frame) and bool(moved)
                if after > 8:
                    break
            await asyncio.to_thread(process.wait, PATIENCE_S)  # it holds a device's memory as long as it is there
    assert [event.reason for event in moved] == ["GENERATOR_LOST"]
    await cluster.serves()


async def test_a_decoder_that_is_frozen_does_not_show(cluster: Cluster) -> None:
    async with asyncio.timeout(2 * PATIENCE_S), cluster.session(FOX, seed=SEED) as session:
        _, frames = await collect(session, 4)
        with cluster.frozen("VaeDecoder") as process:
            _, later = await collect(session, 8)
            await asyncio.to_thread(process.wait, PATIENCE_S)  # it holds a device's memory as long as it is there
    assert same({**frames, **later}, in_process(None, 8))
    await cluster.until_free()


async def test_a_text_encoder_that_is_frozen_is_replaced_while_a_session_runs(cluster: Cluster) -> None:
    async with asyncio.timeout(2 * PATIENCE_S), cluster.session() as session:
        await first_frame(session.__anext__)
        with cluster.frozen("TextEncoder") as process:
            await session.update_prompt(SNOW)
            await asyncio.to_thread(process.wait, PATIENCE_S)
            async for event in session:
                if isinstance(event, Frame) and event.prompt_id == "second":
                    break
    await cluster.until_free()


async def test_a_proxy_that_dies_leaves_no_lease(cluster: Cluster) -> None:
    async with cluster.session() as session:
        await first_frame(session.__anext__)
        cluster.kill_proxy()
        with pytest.raises(VideoServiceError) as caught:
            await collect(session, 1 << 30)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    await cluster.until_reachable()
    await cluster.serves()


async def test_a_gateway_that_dies_leaves_its_word_and_no_lease(cluster: Cluster) -> None:
    async with cluster.session() as session:
        await first_frame(session.__anext__)
        cluster.kill("Gateway")
        with pytest.raises(VideoServiceError) as caught:
            await collect(session, 1 << 30)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "GATEWAY_LOST")
    assert "Traceback" not in caught.value.message
    await cluster.serves()


@pytest.mark.parametrize("lose", [Cluster.kill_admission, Cluster.end_admission])
async def test_admission_that_dies_takes_no_session_with_it(cluster: Cluster, lose: Callable[[Cluster], None]) -> None:
    async with cluster.session() as running:
        await first_frame(running.__anext__)
        lose(cluster)
        async with cluster.session() as waiting:
            told = await anext(waiting)
            assert isinstance(told, Queued | Started)
            _, frames = await collect(running, 8)
            assert 7 in frames
            await running.end()
            await first_frame(waiting.__anext__)
    await cluster.serves()


async def test_a_text_encoder_that_dies_is_replaced_while_a_session_runs(cluster: Cluster) -> None:
    async with asyncio.timeout(2 * PATIENCE_S), cluster.session() as session:
        await first_frame(session.__anext__)
        cluster.kill("TextEncoder")
        await session.update_prompt(SNOW)
        await cluster.until_text_is_encoded()  # without acks the generator rests, and the replacement starts sooner
        async for event in session:
            if isinstance(event, Frame) and event.prompt_id == "second":
                break
    await cluster.until_free()


async def test_a_client_that_only_reads_gets_its_video_and_the_model_is_told(cluster: Cluster) -> None:
    async with asyncio.timeout(PATIENCE_S), grpc.aio.insecure_channel(cluster.address) as channel:
        stub = video_pb2_grpc.VideoServiceStub(channel)  # type: ignore[no-untyped-call]
        model = await stub.GetModel(pb.GetModelRequest())
        assert (model.model.name, model.sizes[0].height) == ("tiny", SIZE)
        prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="a red circle")])
        config = pb.SessionConfig(prompt=prompt, height=SIZE, width=SIZE, codec="FRAME_CODEC_H264_ANNEXB")
        request = pb.GenerateVideoRequest(config=config)
        request.duration.FromMilliseconds(500)
        heard = [answer.message async for answer in stub.GenerateVideo(request)]
        assert heard[-1].session_ended.reason == pb.END_REASON_COMPLETE
        frames = [message.frame for message in heard if message.HasField("frame")]
        assert len(frames) == 9
        with av.open(io.BytesIO(b"".join(frame.data for frame in frames))) as container:
            assert len(list(container.decode(video=0))) == len(frames)
    await cluster.until_free()
