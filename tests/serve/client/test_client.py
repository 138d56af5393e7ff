"""The clients against a real gRPC server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import numpy as np
import pytest

from causal_forcing.prompts import PromptUpdate, SwitchPolicy, WeightedPrompt
from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc
from serve.client import (
    AsyncVideoClient,
    Ended,
    Ending,
    Event,
    Frame,
    FramesDropped,
    Moved,
    PromptApplied,
    PromptRefused,
    Queued,
    Started,
    StreamOptions,
    VideoClient,
    VideoServiceError,
)
from serve.client.events import prompt_to_proto
from serve.errors import Unavailable
from serve.gateway.requests import parse_prompt
from serve.gateway.service import set_status
from serve.simulated import mark
from serve.status import Failure
from tests.serve.fakes import FakeBackends, simulated
from tests.serve.server import serving, serving_in_background


async def test_a_session_with_a_prompt_switch() -> None:
    backends, events = FakeBackends(), list[Event]()
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox", seed=3, codec="png")) as session,
    ):
        async for event in session:
            events.append(event)
            if isinstance(event, Frame) and event.last_in_chunk and event.chunk_index == 1:
                name = await session.update_prompt("snow")
            if isinstance(event, Frame) and event.prompt_id == "prompt-1":
                await session.end()
    assert [type(event) for event in events[:4]] == [Queued, Started, PromptApplied, Frame]
    frames = [event for event in events if isinstance(event, Frame)]
    assert [frame.frame_index for frame in frames] == list(range(len(frames)))
    applied = [event for event in events if isinstance(event, PromptApplied)]
    assert [entry.prompt_id for entry in applied] == ["prompt-0", name]
    ended = events[-1]
    assert isinstance(ended, Ended)
    assert ended.reason == "CLIENT"
    assert frames[0].pixels().shape == (64, 64, 3)
    assert frames[5].pixels()[0, 0, 0] == mark(3) % 256
    assert backends.is_clean


async def test_a_move_to_another_generator_is_an_event_between_frames() -> None:
    backends, events = FakeBackends(losses=[3]), list[Event]()
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox")) as session,
    ):
        async for event in session:
            events.append(event)
            if isinstance(event, Frame) and event.last_in_chunk and event.chunk_index == 5:
                await session.end()
    moved = next(event for event in events if isinstance(event, Moved))
    assert (moved.chunk_index, moved.frame_index, moved.reason) == (3, 9, "GENERATOR_LOST")
    after = events[events.index(moved) + 1]
    assert isinstance(after, Frame)
    assert (after.chunk_index, after.frame_index) == (3, 9)
    assert backends.is_clean


async def test_a_paused_h264_session_goes_on_with_the_keyframe_that_was_asked_for() -> None:
    backends, frames = FakeBackends(), list[Frame]()
    options = StreamOptions(
        "a fox", codec="h264_fmp4", pacing="as_fast_as_possible", credit_chunks=1, h264_keyframe_interval_frames=600
    )
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(options) as session,
    ):
        async for event in session:
            if not isinstance(event, Frame):
                continue
            frames.append(event)
            if event.last_in_chunk and event.chunk_index == 1:
                await session.pause()
                await session.request_keyframe()
                await session.resume()
            if event.last_in_chunk and event.chunk_index == 3:
                await session.end()
    assert [frame.frame_index for frame in frames if frame.keyframe] == [0, 5]
    assert [bool(frame.init_segment) for frame in frames[:5]] == [True, False, False, False, False]
    assert frames[0].timings is not None
    assert frames[0].timings.queue_s > 0
    with pytest.raises(ValueError, match="not a picture by itself"):
        frames[0].pixels()


async def test_a_slow_client_hears_what_it_missed() -> None:
    backends = FakeBackends(simulated(limits={"max_session_s": 0.6, "ending_notice_s": 0.2}))
    options = StreamOptions("a fox", slow_client_policy="drop_to_latest", frames_per_second=60, credit_chunks=1)
    events = list[Event]()
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(options) as session,
    ):
        async for event in session:
            events.append(event)
            if isinstance(event, Frame) and event.chunk_index == 0:
                await backends.leaving.wait()  # the ack goes out when the next event is asked for
    dropped = [event for event in events if isinstance(event, FramesDropped)]
    assert (dropped[0].first_chunk_index, dropped[0].first_frame_index) == (1, 1)
    assert any(isinstance(event, Ending) for event in events)
    assert isinstance(events[-1], Ended)


async def test_a_refused_prompt_is_an_event_and_the_session_goes_on() -> None:
    backends, events = FakeBackends(simulated(limits={"max_pending_prompts": 1})), list[Event]()
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox", pacing="as_fast_as_possible")) as session,
    ):
        async for event in session:
            events.append(event)
            if isinstance(event, Frame) and event.last_in_chunk and event.chunk_index == 1:
                backends.encode_gate = asyncio.Event()
                await session.update_prompt("snow")
                beyond = await session.update_prompt("rain")
            if isinstance(event, PromptRefused) and backends.encode_gate is not None:
                backends.encode_gate.set()
            if isinstance(event, Frame) and event.prompt_id == "prompt-1":
                await session.end()
    refused = [event for event in events if isinstance(event, PromptRefused)]
    assert [(event.prompt_id, event.reason, event.retry_after_s) for event in refused] == [
        (beyond, "TOO_MANY_PROMPTS", 2.0)
    ]
    assert refused[0].error_id
    assert isinstance(events[-1], Ended)


async def test_a_prompt_before_the_first_event_comes_after_the_configuration() -> None:
    async with (
        serving(FakeBackends()) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox")) as session,
    ):
        name = await session.update_prompt("snow")
        async for event in session:
            if isinstance(event, Frame) and event.prompt_id == name:
                break


async def test_a_session_begins_before_anybody_reads_it() -> None:
    backends = FakeBackends()
    async with (
        asyncio.timeout(30),
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox")),
    ):
        while not backends.running:  # noqa: ASYNC110  (the generator's lease has no event for us)
            await asyncio.sleep(0.01)


async def test_waiting_for_an_event_may_be_given_up() -> None:
    frames, given_up = list[int](), 0
    async with (
        serving(FakeBackends()) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox", credit_chunks=1)) as session,
    ):
        while len(frames) < 9:
            try:
                async with asyncio.timeout(0.001):
                    event = await anext(session)
            except TimeoutError:
                given_up += 1
                continue
            if isinstance(event, Frame):
                frames.append(event.frame_index)
    assert frames == list(range(9))
    assert given_up


async def test_leaving_the_block_ends_the_session_on_the_server() -> None:
    backends = FakeBackends()
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox")) as session,
    ):
        async for event in session:
            if isinstance(event, Frame):
                break
    assert backends.events[-1] == "leave"
    assert backends.is_clean


async def test_a_chunk_is_acknowledged_when_the_next_event_is_asked_for() -> None:
    backends = FakeBackends(simulated(limits={"stall_timeout_s": 0.3}))
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox", credit_chunks=1)) as session,
    ):
        frames = 0
        async for event in session:
            frames += isinstance(event, Frame)
            if frames == 13:
                break
    assert frames == 13


async def test_a_refused_request_names_its_field() -> None:
    async with (
        serving(FakeBackends()) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox", height=480, width=832)) as session,
    ):
        with pytest.raises(VideoServiceError) as caught:
            await anext(session)
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.reason, error.field) == ("UNSUPPORTED_RESOLUTION", "height")
    assert "must be one of 64x64" in error.message
    assert error.error_id


async def test_an_error_that_may_pass_says_when_to_come_back() -> None:
    backends = FakeBackends(decode_failures=[Unavailable("died", reason="DECODER_LOST")])
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.stream(StreamOptions("a fox")) as session,
    ):
        with pytest.raises(VideoServiceError) as caught:
            async for _ in session:
                pass
    assert (caught.value.reason, caught.value.retry_after_s) == ("DECODER_LOST", 2.0)


class Silent(video_pb2_grpc.VideoServiceServicer):
    """Takes a session and does nothing more, as a process that hangs."""

    async def StreamVideo(self, requests: Any, context: Any) -> AsyncIterator[pb.StreamVideoResponse]:  # noqa: N802
        yield pb.StreamVideoResponse(queue_status=pb.QueueStatus())
        await asyncio.get_running_loop().create_future()


class Refusing(video_pb2_grpc.VideoServiceServicer):
    """Ends a call with an error at the second message."""

    async def StreamVideo(self, requests: Any, context: Any) -> AsyncIterator[pb.StreamVideoResponse]:  # noqa: N802
        await anext(requests)
        yield pb.StreamVideoResponse(queue_status=pb.QueueStatus())
        await anext(requests)
        failure = Failure("UNAVAILABLE", "DECODER_LOST", "died", {}, 2.0)
        set_status(context, failure)
        yield pb.StreamVideoResponse(sequence=1, error=failure.to_proto())


async def test_the_servers_error_is_heard_by_a_client_that_is_writing() -> None:
    server = grpc.aio.server()
    video_pb2_grpc.add_VideoServiceServicer_to_server(Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        client = await stack.enter_async_context(AsyncVideoClient(f"127.0.0.1:{port}"))
        for _ in range(20):
            async with client.stream(StreamOptions("a fox")) as session:
                assert isinstance(await anext(session), Queued)
                for _ in range(200):  # the call ends somewhere between them
                    await session.request_keyframe()
                with pytest.raises(VideoServiceError) as caught:
                    await anext(session)
            assert (caught.value.reason, caught.value.retry_after_s) == ("DECODER_LOST", 2.0)


async def test_a_server_that_answers_nothing_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.client.session.PING_EVERY_S", 0.01)
    server = grpc.aio.server()
    video_pb2_grpc.add_VideoServiceServicer_to_server(Silent(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        client = await stack.enter_async_context(AsyncVideoClient(f"127.0.0.1:{port}"))
        session = await stack.enter_async_context(client.stream(StreamOptions("a fox")))
        assert isinstance(await anext(session), Queued)
        with pytest.raises(VideoServiceError) as caught:
            await anext(session)
    assert (caught.value.reason, caught.value.is_retryable) == ("SERVER_SILENT", True)


async def test_a_server_that_is_not_there_is_an_error_without_a_reason() -> None:
    async with AsyncVideoClient("127.0.0.1:1") as client, client.stream(StreamOptions("a fox")) as session:
        with pytest.raises(VideoServiceError) as caught:
            await anext(session)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")


def test_a_status_without_a_message_keeps_its_reason() -> None:
    error = VideoServiceError.from_status(grpc.StatusCode.UNAVAILABLE, "GATEWAY_LOST: the process died")
    assert (error.reason, error.message) == ("GATEWAY_LOST", "the process died")


def test_the_blocking_client_does_the_same() -> None:
    backends, events = FakeBackends(), list[Event]()
    with (
        serving_in_background(backends) as address,
        VideoClient(address) as client,
        client.stream(StreamOptions("a fox", codec="raw_rgb24")) as session,
    ):
        for event in session:
            events.append(event)
            if isinstance(event, Frame) and event.chunk_index == 2 and event.last_in_chunk:
                session.update_prompt("snow")
            if isinstance(event, Frame) and event.prompt_id == "prompt-1" and event.last_in_chunk:
                session.end()
    assert isinstance(events[-1], Ended)
    frames = [event for event in events if isinstance(event, Frame)]
    assert np.array_equal(frames[1].pixels(), frames[2].pixels())
    assert backends.is_clean


def test_a_prompt_survives_the_way_to_the_server() -> None:
    update = PromptUpdate(
        (WeightedPrompt("a", 0.25), WeightedPrompt("b", 0.75)),
        blend="slerp",  # type: ignore[arg-type]
        transition_chunks=3,
        policy=SwitchPolicy.RECACHE,
        prompt_id="mine",
    )
    assert parse_prompt(prompt_to_proto(update), 1) == update


def test_the_client_needs_neither_torch_nor_ray() -> None:
    program = (
        "import sys, serve.client, serve.commands.viewing; "
        "print([m for m in ('torch', 'ray', 'numpy', 'PIL', 'pydantic', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
