"""A session outlives its generator: only the model's long memory is lost. It does not outlive them all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.codecs.frames import Codec, decode_frame
from serve.errors import Unavailable
from serve.gateway.control_line import ControlLine
from serve.gateway.moves import PROGRESS_CHUNKS, GeneratorLost, Moves
from serve.logs import LOGGER
from serve.messages import Credit, QueuePlace, SetPaused, SetPrompt, Stop
from serve.planted import ALWAYS
from serve.simulated import mark
from serve.status import FailedElsewhere, failure_of
from tests.serve.fakes import REPLICA, Client, FakeBackends, embedding, kinds, open_session, play, simulated, update

RAW = {"codec": "FRAME_CODEC_RAW_RGB24", "pacing": "PACING_AS_FAST_AS_POSSIBLE"}


async def run(
    client: Client, backends: FakeBackends, on_message: Callable[[pb.StreamVideoResponse], None]
) -> list[pb.StreamVideoResponse]:
    async with asyncio.timeout(20):
        return await play(open_session(backends, client), client, on_message)


def acking(client: Client, last_chunk: int) -> Callable[[pb.StreamVideoResponse], None]:
    """Ack every chunk, and end the session after one."""

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            if message.frame.chunk_index >= last_chunk:
                client.send(end=pb.End())
            else:
                client.ack(message.frame.chunk_index)

    return on_message


def frames_of(heard: list[pb.StreamVideoResponse]) -> list[pb.VideoFrame]:
    return [message.frame for message in heard if message.HasField("frame")]


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_session_goes_on_when_its_generator_dies(after: int) -> None:
    client, backends = Client(), FakeBackends(losses=[after])
    client.config(**RAW)
    heard = await run(client, backends, acking(client, 8))
    frames = frames_of(heard)
    assert [frame.frame_index for frame in frames] == list(range(1 + 4 * 8))
    assert [frame.chunk_index for frame in frames] == [0] + [i for i in range(1, 9) for _ in range(4)]
    assert [message.sequence for message in heard] == list(range(len(heard)))
    colours = [decode_frame(Codec.RAW_RGB24, frame.data, 64, 64)[0, 0] for frame in frames]
    assert [int(colour[1]) for colour in colours] == [frame.chunk_index for frame in frames]
    assert {int(colour[0]) for colour in colours} == {mark(1) % 256}
    assert len({int(colour[2]) for colour in colours}) == 1
    moved = next(message for message in heard if message.HasField("session_moved"))
    assert (moved.session_moved.chunk_index, moved.session_moved.reason) == (after, "GENERATOR_LOST")
    later = [m.frame for m in heard[moved.sequence :] if m.HasField("frame")]
    assert (later[0].chunk_index, later[0].frame_index) == (after, moved.session_moved.frame_index)
    assert kinds(heard).count("session_started") == kinds(heard).count("prompt_applied") == 1
    assert heard[-1].session_ended.chunk_count == 9
    assert backends.events == [f"confirm {REPLICA}", f"requeue {REPLICA}", f"confirm {REPLICA}", "leave"]
    assert backends.is_clean


async def test_prompts_that_the_lost_generator_had_not_shown_are_shown_by_the_next() -> None:
    client, backends = Client(), FakeBackends(losses=[3])
    client.config(credit_chunks=1, **RAW)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            if message.frame.chunk_index == 2:
                for name in ("b", "c"):
                    client.prompt(name, prompt_id=name)
            if message.frame.prompt_id == "c" and message.frame.chunk_index == 5:
                client.send(end=pb.End())
            else:
                client.ack(message.frame.chunk_index)

    heard = await run(client, backends, on_message)
    told = [m.prompt_applied for m in heard if m.HasField("prompt_applied")]
    names = [name for entry in told for name in (*entry.superseded_prompt_ids, entry.prompt_id)]
    assert names == ["first", "b", "c"]
    assert backends.is_clean


async def test_a_transition_and_a_scene_go_on_where_they_were() -> None:
    client, backends = Client(), FakeBackends(losses=[6])
    client.config(credit_chunks=1, **RAW)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            if message.frame.chunk_index == 3:
                client.prompt("cut", prompt_id="cut", policy="SWITCH_POLICY_SCENE_CUT")
            if message.frame.chunk_index == 9:
                client.send(end=pb.End())
            else:
                client.ack(message.frame.chunk_index)

    heard = await run(client, backends, on_message)
    counts = [sum(frame.chunk_index == chunk for frame in frames_of(heard)) for chunk in range(10)]
    cut = next(m.prompt_applied.chunk_index for m in heard if m.prompt_applied.prompt_id == "cut")
    assert counts == [1 if chunk in (0, cut) else 4 for chunk in range(10)]


async def test_a_waiting_session_hears_where_it_stands_and_may_leave() -> None:
    client, backends = Client(), FakeBackends(losses=[2])
    client.config(**RAW)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            backends.places_script = [QueuePlace(0)]  # nobody is free from now on
            client.ack(message.frame.chunk_index)
        if message.HasField("queue_status") and message.sequence > 0:
            client.half_close()

    heard = await run(client, backends, on_message)
    assert kinds(heard)[-3:] == ["frame", "queue_status", "session_ended"]
    assert backends.events[-2:] == [f"requeue {REPLICA}", "leave"]
    assert backends.is_clean


async def test_without_another_generator_the_session_ends_and_says_why() -> None:
    client, backends = Client(), FakeBackends(simulated(limits={"move_timeout_s": 0.1}), losses=[2])
    client.config(**RAW)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk:
            backends.places_script = [QueuePlace(0)]
            client.ack(message.frame.chunk_index)

    heard = await run(client, backends, on_message)
    error = heard[-1].error
    assert (error.status.code, error.reason) == (14, "GENERATOR_LOST")
    assert "no other one within 0.1 s" in error.status.message
    assert any(detail.type_url.endswith("RetryInfo") for detail in error.status.details)
    assert backends.is_clean


async def test_moves_can_be_turned_off() -> None:
    client, backends = Client(), FakeBackends(simulated(limits={"max_moves_in_a_row": 0}), losses=[2])
    client.config(**RAW)
    heard = await run(client, backends, acking(client, 8))
    assert (heard[-1].error.reason, heard[-1].error.status.code) == ("GENERATOR_LOST", 14)
    assert backends.events == [f"confirm {REPLICA}", f"retire {REPLICA}", "leave"]
    assert backends.is_clean


async def test_a_session_whose_generators_keep_dying_ends() -> None:
    client, backends = Client(), FakeBackends(losses=[2, 2, 2, 2, 2])
    client.config(**RAW)
    heard = await run(client, backends, acking(client, 30))
    assert heard[-1].error.reason == "GENERATOR_LOST"
    assert kinds(heard).count("session_moved") == 3
    assert backends.is_clean


async def test_a_session_that_makes_progress_may_lose_many() -> None:
    client, backends = Client(), FakeBackends(losses=[PROGRESS_CHUNKS] * 6)
    client.config(**RAW)
    heard = await run(client, backends, acking(client, 7 * PROGRESS_CHUNKS))
    assert heard[-1].HasField("session_ended")
    assert kinds(heard).count("session_moved") == 6


@pytest.mark.parametrize("fault", ["nan", "oom", "cuda"])
async def test_one_device_fault_moves_the_session(fault: str, tmp_path: Path) -> None:
    backends = FakeBackends(simulated(simulated={"chunk_ms": 0, "fault_dir": str(tmp_path)}))
    client = Client()
    client.config(**RAW)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk and message.frame.chunk_index == 2:
            (tmp_path / fault).touch()
        acking(client, 9)(message)

    heard = await run(client, backends, on_message)
    assert [m.session_moved.reason for m in heard if m.HasField("session_moved")] == ["DEVICE_FAULT"]
    assert [frame.frame_index for frame in frames_of(heard)] == list(range(1 + 4 * 9))
    assert backends.is_clean


async def test_a_session_that_makes_nan_again_ends_and_spares_the_other_generators(tmp_path: Path) -> None:
    backends = FakeBackends(simulated(simulated={"chunk_ms": 0, "fault_dir": str(tmp_path)}))
    client = Client()
    client.config(**RAW)

    def on_message(message: pb.StreamVideoResponse) -> None:
        if message.frame.last_in_chunk and message.frame.chunk_index == 2:
            (tmp_path / f"nan{ALWAYS}").touch()
        acking(client, 9)(message)

    heard = await run(client, backends, on_message)
    assert (heard[-1].error.reason, heard[-1].error.status.code) == ("DEVICE_FAULT", 14)
    assert kinds(heard).count("session_moved") == 1
    assert backends.events.count(f"confirm {REPLICA}") == 2
    assert backends.is_clean


async def test_an_error_that_is_not_the_generators_death_does_not_move_the_session(tmp_path: Path) -> None:
    backends = FakeBackends(simulated(simulated={"chunk_ms": 0, "fault_dir": str(tmp_path)}))
    (tmp_path / "error").touch()
    client = Client()
    client.config(**RAW)
    heard = await run(client, backends, acking(client, 3))
    assert (heard[-1].error.reason, heard[-1].error.status.code) == ("UNEXPECTED", 13)
    assert not any(event.startswith("requeue") for event in backends.events)


@pytest.mark.parametrize("fault", ["", "nan"])
async def test_each_move_is_a_line_in_the_gateways_log(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)
    backends = FakeBackends(simulated(simulated={"chunk_ms": 0, "fault_dir": str(tmp_path)}))
    if fault:
        (tmp_path / fault).touch()
    else:
        backends.losses = [0]
    client = Client()
    client.config(**RAW)
    heard = await run(client, backends, acking(client, 3))
    reason = next(m.session_moved.reason for m in heard if m.HasField("session_moved"))
    (line,) = {text for text in caplog.messages if text.startswith("the session has lost")}
    assert line.startswith(f"the session has lost generator {REPLICA} before chunk 0: {reason}: ")


def loss(reason: str) -> GeneratorLost:
    return GeneratorLost(failure_of(Unavailable("gone", reason=reason)))


def test_the_second_fault_in_a_row_is_one_too_many_even_between_deaths() -> None:
    moves = Moves(simulated().limits)
    moves.begin(loss("DEVICE_FAULT"), 5)
    moves.begin(loss("GENERATOR_LOST"), 6)
    with pytest.raises(FailedElsewhere) as caught:
        moves.begin(loss("DEVICE_FAULT"), 7)
    assert caught.value.failure.reason == "DEVICE_FAULT"


class Room:
    """A mailbox that keeps what each log was given."""

    def __init__(self) -> None:
        self.logs: dict[str, list[Any]] = {}
        self.closed: list[str] = []

    async def open_mailbox(self, log_id: str) -> None:
        self.logs[log_id] = []

    async def put(self, log_id: str, message: Any) -> None:
        self.logs[log_id].append(message)

    async def close_mailbox(self, log_id: str) -> None:
        self.closed.append(log_id)


async def test_as_many_prompts_as_may_wait_are_said_again() -> None:
    backends, count = FakeBackends(), 200
    line = ControlLine(backends, "s")
    for number in range(count):
        await line.prompt(update(prompt_id=str(number)), [embedding(str(number))])
    for _ in range(2):
        messages = [message for _, message in await backends.room.poll(await line.open(), 0, 0.0)]
        assert [m.update.prompt_id for m in messages if isinstance(m, SetPrompt)] == [str(n) for n in range(count)]


async def test_a_new_lease_is_told_what_holds_and_what_was_not_shown() -> None:
    room = Room()
    line = ControlLine(room, "s")
    await line.prompt(update(prompt_id="a"), [embedding("x")])
    assert await line.open() == "s.1"
    await line.prompt(update(prompt_id="b"), [embedding("x")])
    await line.prompt(update(prompt_id="c"), [embedding("y")])
    for message in (Credit(3), Credit(4), SetPaused(True), Stop()):
        await line.put(message)
    assert line.shown(1)[0].prompt_id == "b"
    assert await line.open() == "s.2"
    assert room.closed == ["s.1"]
    assert room.logs["s.2"][:2] == [SetPaused(True), Credit(4)]
    again = room.logs["s.2"][2:]
    assert [(m.update.prompt_id, [e.key for e in m.embeddings]) for m in again] == [("c", ["y"])]
    first = [m for m in room.logs["s.1"] if isinstance(m, SetPrompt)]
    assert [[e.key for e in m.embeddings] for m in first] == [["x"], [], ["y"]]
    await line.close()
    assert room.closed == ["s.1", "s.2"]
