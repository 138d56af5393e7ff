"""One client's session in the gateway, over a real lease, mailbox and decoder in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.codecs.frames import Codec, decode_frame
from serve.errors import Unavailable
from serve.messages import QueuePlace
from serve.simulated import mark
from tests.serve.fakes import LOST, REPLICA, Client, FakeBackends, kinds, open_session, play, simulated

RAW = {"codec": "FRAME_CODEC_RAW_RGB24"}


def acking(client: Client, last_chunk: int, then: Callable[[], None]) -> Callable[[pb.StreamVideoResponse], None]:
    """Ack every chunk up to one, and then do something."""

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            if message.frame.chunk_index < last_chunk:
                client.ack(message.frame.chunk_index)
            elif message.frame.chunk_index == last_chunk:
                then()

    return on_message


def end_of(client: Client) -> Callable[[], None]:
    return lambda: client.send(end=pb.End())


async def run(
    client: Client, backends: FakeBackends, on_message: Callable[[pb.StreamVideoResponse], None] = lambda _: None
) -> list[pb.StreamVideoResponse]:
    async with asyncio.timeout(20):
        return await play(open_session(backends, client), client, on_message)


async def test_a_session_from_its_config_to_its_end() -> None:
    client, backends = Client(), FakeBackends()
    client.config()
    heard = await run(client, backends, acking(client, 3, end_of(client)))
    assert [message.sequence for message in heard] == list(range(len(heard)))
    assert kinds(heard) == [
        "queue_status", "session_started", "prompt_applied", "frame", "session_ended"
    ]  # fmt: skip
    frames = [message.frame for message in heard if message.HasField("frame")]
    assert [frame.frame_index for frame in frames] == list(range(13))
    assert [frame.chunk_index for frame in frames] == [0] + [1] * 4 + [2] * 4 + [3] * 4
    assert [frame.frame_index for frame in frames if frame.last_in_chunk] == [0, 4, 8, 12]
    assert all(frame.HasField("timings") == frame.last_in_chunk for frame in frames)
    ended = heard[-1].session_ended
    assert ended.reason == pb.END_REASON_CLIENT
    assert (ended.chunk_count, ended.frame_count) == (4, 13)
    assert ended.byte_count == sum(len(frame.data) for frame in frames)
    assert backends.events == [f"confirm {REPLICA}", "leave"]
    assert backends.is_clean


async def test_what_started_tells_is_what_runs() -> None:
    client, backends = Client(), FakeBackends()
    client.config(seed=5, denoising_steps=[1000, 500], window_frames=7, **RAW)
    heard = await run(client, backends, acking(client, 0, end_of(client)))
    started = heard[1].session_started
    assert started.effective_config.seed == 5
    assert list(started.effective_config.denoising_steps) == [1000, 500]
    assert started.model.name == "tiny"
    assert not started.model.trained
    assert started.limits.silence_timeout.seconds == 30
    pixels = decode_frame(Codec.RAW_RGB24, heard[3].frame.data, 64, 64)
    assert pixels[0, 0, 0] == mark(5) % 256


async def test_the_server_never_runs_further_ahead_than_the_credit() -> None:
    client, backends = Client(), FakeBackends(simulated(limits={"stall_timeout_s": 0.3}))
    client.config(credit_chunks=3)
    heard = await run(client, backends)
    assert max(message.frame.chunk_index for message in heard) == 2
    assert heard[-1].error.reason == "CLIENT_TOO_SLOW"
    assert backends.is_clean


async def test_a_prompt_switch_is_told_before_its_first_frame() -> None:
    client, backends = Client(), FakeBackends()
    client.config()

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            if message.frame.chunk_index == 2:
                client.prompt("snow", prompt_id="snow")
            if message.frame.prompt_id == "snow":
                client.send(end=pb.End())
            else:
                client.ack(message.frame.chunk_index)

    heard = await run(client, backends, on_message)
    applied = [message.prompt_applied for message in heard if message.HasField("prompt_applied")]
    assert [entry.prompt_id for entry in applied] == ["first", "snow"]
    for entry in applied:
        first = next(m.frame for m in heard if m.HasField("frame") and m.frame.prompt_id == entry.prompt_id)
        assert (first.chunk_index, first.frame_index) == (entry.chunk_index, entry.frame_index)
    assert 3 <= applied[1].chunk_index <= 5
    assert backends.is_clean


async def test_prompts_are_applied_in_the_order_they_were_sent() -> None:
    client, backends = Client(), FakeBackends(encode_gate=asyncio.Event())
    client.config(credit_chunks=1)
    assert backends.encode_gate is not None
    for name in "bcd":
        client.prompt(name, prompt_id=name)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.HasField("session_started"):
            backends.encode_gate.set()  # type: ignore[union-attr]  # all four at once
        if message.frame.last_in_chunk:
            client.ack(message.frame.chunk_index)
            if message.frame.prompt_id == "d":
                client.send(end=pb.End())

    heard = await run(client, backends, on_message)
    told = [m.prompt_applied for m in heard if m.HasField("prompt_applied")]
    names = [name for entry in told for name in (*entry.superseded_prompt_ids, entry.prompt_id)]
    assert names == ["first", "b", "c", "d"]


async def test_too_many_prompts_at_once_are_refused_by_name() -> None:
    client, backends = Client(), FakeBackends(simulated(limits={"max_pending_prompts": 2}))
    backends.encode_gate = asyncio.Event()
    client.config()
    client.prompt("b", prompt_id="b")
    client.prompt("c", prompt_id="c")

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.HasField("prompt_refused"):
            backends.encode_gate.set()  # type: ignore[union-attr]
        if message.frame.last_in_chunk:
            client.ack(message.frame.chunk_index)
            if message.frame.prompt_id == "b":
                client.prompt("d", prompt_id="d")
            if message.frame.prompt_id == "d":
                client.send(end=pb.End())

    heard = await run(client, backends, on_message)
    refused = [message.prompt_refused for message in heard if message.HasField("prompt_refused")]
    assert [(entry.prompt_id, entry.reason) for entry in refused] == [("c", "TOO_MANY_PROMPTS")]
    assert refused[0].retry_after.seconds == 2
    assert heard[-1].HasField("session_ended"), "there is room again after the others have been shown"
    assert backends.is_clean


async def test_a_waiting_session_hears_where_it_stands() -> None:
    client = Client()
    backends = FakeBackends(places_script=[QueuePlace(2, 30.0), QueuePlace(1), QueuePlace(0, None, REPLICA)])
    client.config()
    heard = await run(client, backends, acking(client, 0, end_of(client)))
    told = [m.queue_status for m in heard if m.HasField("queue_status")]
    assert [entry.sessions_ahead_count for entry in told] == [2, 1]
    assert told[0].estimated_wait.seconds == 30
    assert not told[1].HasField("estimated_wait")


async def test_a_waiting_session_is_kept_alive_by_pings_and_can_leave() -> None:
    client, backends = Client(), FakeBackends(places_script=[QueuePlace(5)])
    client.config()

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.HasField("queue_status"):
            client.send(ping=pb.Ping(nonce=9))
        if message.HasField("pong"):
            client.half_close()

    heard = await run(client, backends, on_message)
    assert kinds(heard) == ["queue_status", "pong", "session_ended"]
    assert heard[1].pong.nonce == 9
    assert heard[2].session_ended.duration.ToNanoseconds() == 0
    assert backends.events == ["leave"]
    assert backends.is_clean


@pytest.mark.parametrize("how", ["end", "half-close", "proxy dies"])
async def test_the_end_of_the_clients_stream_ends_the_session(how: str) -> None:
    client, backends = Client(), FakeBackends()
    client.config()
    ways: dict[str, Callable[[], None]] = {
        "end": end_of(client),
        "half-close": client.half_close,
        "proxy dies": lambda: client.fail(ActorDiedError()),
    }
    heard = await run(client, backends, acking(client, 1, ways[how]))
    assert heard[-1].session_ended.reason == pb.END_REASON_CLIENT
    assert backends.is_clean


@pytest.mark.parametrize("at", ["queue_status", "session_started", "frame"])
async def test_a_cancelled_call_leaves_nothing_behind(at: str) -> None:
    client, backends = Client(), FakeBackends()
    client.config()
    async with asyncio.timeout(20), aclosing(open_session(backends, client).messages()) as messages:
        async for message in messages:
            if message.HasField(at):  # type: ignore[arg-type]
                break
    assert backends.events[-1] == "leave"
    assert backends.is_clean


async def test_a_cancel_that_comes_while_everything_is_given_back_does_not_interrupt_it() -> None:
    client, backends = Client(), FakeBackends(leave_gate=asyncio.Event())
    client.config()
    messages = open_session(backends, client).messages()
    async with asyncio.timeout(20):
        while not (await anext(messages)).HasField("frame"):
            pass
        client.half_close()  # first the input ends, and a moment later Serve cancels the call
        await backends.leaving.wait()
        closing = asyncio.create_task(messages.aclose())
        await asyncio.sleep(0)
        assert backends.leave_gate is not None
        backends.leave_gate.set()
        await closing
    assert backends.events[-1] == "leave"
    assert backends.is_clean


SILENT = [
    ({"config_timeout_s": 0.05}, False, "CLIENT_SILENT"),
    ({"silence_timeout_s": 0.05}, True, "CLIENT_SILENT"),
]


@pytest.mark.parametrize(("limits", "configured", "reason"), SILENT)
async def test_a_silent_client_is_gone(limits: dict[str, float], configured: bool, reason: str) -> None:
    client, backends = Client(), FakeBackends(simulated(limits=limits))
    if configured:
        client.config()
    heard = await run(client, backends)
    assert (heard[-1].error.reason, heard[-1].error.status.code) == (reason, 10)
    assert backends.is_clean


async def test_a_session_has_a_longest_length() -> None:
    client, backends = Client(), FakeBackends(simulated(limits={"max_session_s": 0.1}))
    client.config()
    heard = await run(client, backends, acking(client, 1 << 30, end_of(client)))
    assert heard[-1].session_ended.reason == pb.END_REASON_MAX_DURATION
    assert backends.is_clean


WRONG: list[tuple[dict[str, Any], str, int]] = [
    ({"ping": pb.Ping()}, "CONFIG_NOT_FIRST", 9),
    ({"config": pb.SessionConfig()}, "INVALID_PROMPT", 3),
]


@pytest.mark.parametrize(("message", "reason", "code"), WRONG)
async def test_a_wrong_first_message_takes_no_place(message: dict[str, Any], reason: str, code: int) -> None:
    client, backends = Client(), FakeBackends()
    client.send(**message)
    heard = await run(client, backends)
    assert kinds(heard) == ["error"]
    assert (heard[0].error.reason, heard[0].error.status.code) == (reason, code)
    assert backends.events == []
    assert backends.is_clean


async def test_a_stream_that_ends_before_its_config_is_told() -> None:
    client, backends = Client(), FakeBackends()
    client.half_close()
    heard = await run(client, backends)
    assert heard[0].error.reason == "CONFIG_NOT_FIRST"


async def test_an_illegal_message_ends_a_running_session() -> None:
    client, backends = Client(), FakeBackends()
    client.config()
    heard = await run(client, backends, acking(client, 1, lambda: client.ack(50)))
    assert heard[-1].error.reason == "INVALID_ACK"
    assert backends.is_clean


async def test_a_generator_that_cannot_be_reached_is_given_back_and_another_one_serves() -> None:
    client, backends = Client(), FakeBackends(lease_failures=[LOST])
    client.config()
    heard = await run(client, backends, acking(client, 1, end_of(client)))
    assert heard[-1].HasField("session_ended")
    assert backends.events == [f"refuse {REPLICA} gone", f"confirm {REPLICA}", "leave"]


async def test_a_decoder_that_is_gone_for_good_ends_the_session_with_its_reason() -> None:
    client, backends = Client(), FakeBackends()
    backends.decode_failures.append(Unavailable("died", reason="DECODER_LOST"))
    client.config()
    heard = await run(client, backends)
    assert (heard[-1].error.reason, heard[-1].error.status.code) == ("DECODER_LOST", 14)
    assert backends.is_clean


async def test_a_lost_decoder_cache_does_not_show() -> None:
    client, backends = Client(), FakeBackends()
    client.config(**RAW)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            backends.decoder.cache.drop("session-1")
            if message.frame.chunk_index == 4:
                client.send(end=pb.End())
            else:
                client.ack(message.frame.chunk_index)

    heard = await run(client, backends, on_message)
    frames = [m.frame for m in heard if m.HasField("frame")]
    assert [frame.chunk_index for frame in frames] == [0] + [i for i in range(1, 5) for _ in range(4)]


async def test_an_unexpected_error_shows_an_id_and_nothing_else() -> None:
    client, backends = Client(), FakeBackends()
    backends.decode_failures.append(KeyError("a secret"))
    client.config()
    heard = await run(client, backends)
    assert heard[-1].error.reason == "UNEXPECTED"
    assert "secret" not in str(heard[-1])
    assert heard[-1].error.error_id in heard[-1].error.status.message


async def test_a_frame_larger_than_a_message_comes_in_parts() -> None:
    backends = FakeBackends(simulated(simulated={"chunk_ms": 0, "frame_bytes": (5 << 20) // 2}))
    client = Client()
    client.config()
    heard = await run(client, backends, acking(client, 0, end_of(client)))
    parts = [m.frame for m in heard if m.HasField("frame")]
    assert [(p.part_index, p.part_count, p.last_in_chunk) for p in parts] == [
        (0, 3, False),
        (1, 3, False),
        (2, 3, True),
    ]
    assert sum(len(part.data) for part in parts) == (5 << 20) // 2
    assert max(message.ByteSize() for message in heard) <= 1 << 20
