"""What is recorded of a whole session, with the real session, lease and decoder on one event loop."""

from __future__ import annotations

import math

import grpc
import pytest

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.gateway.inputs import StreamInput
from serve.gateway.session import LiveSession
from serve.gateway.session_meter import START_BUFFER_S, Deadlines, SessionMeter
from serve.messages import Decoded, GeneratedChunk
from serve.metrics import MemorySink, Recorder
from serve.metrics.drift import LatentStats
from tests.serve.fakes import Client, Clock, FakeBackends, chunk


class Call:
    """One call, message by message."""

    def __init__(self) -> None:
        self.sink, self.clock = MemorySink(), Clock()
        self.meter = SessionMeter(Recorder(self.sink), self.clock)
        self.client = Client()
        self._requests = self.meter.watch(self.client)

    async def asks(self, **message: object) -> None:
        self.client.send(**message)
        await anext(self._requests)

    def tells(self, **message: object) -> None:
        self.meter.sent(pb.StreamVideoResponse(**message))

    def starts(self, credit: int = 2) -> None:
        self.tells(session_started=pb.SessionStarted(effective_config=pb.SessionConfig(credit_chunks=credit)))

    def sends(self, index: int, prompt_id: str = "first", frames: int = 4, made: GeneratedChunk | None = None) -> None:
        self.meter.chunk(made or chunk(index), Decoded("d", (), 0.25, 0.125), 0.5)
        for number in range(frames):
            last = number == frames - 1
            frame = pb.VideoFrame(chunk_index=index, part_count=1, data=b"abc", last_in_chunk=last, prompt_id=prompt_id)
            self.tells(frame=frame)

    def count(self, *key: str) -> float:
        return self.sink.values.get(key, 0)


async def config(call: Call) -> None:
    await call.asks(config=pb.SessionConfig(prompt=pb.PromptUpdate(prompt_id="first")))


async def test_a_session_is_seen_from_its_configuration_to_its_end() -> None:
    call = Call()
    await config(call)
    assert call.count("sessions", "waiting") == 1
    call.clock.now_s += 3
    call.starts()
    assert call.count("sessions", "waiting") == 0
    assert call.count("sessions", "streaming") == 1
    assert call.count("credits_outstanding") == 2
    call.clock.now_s += 1
    call.sends(0)
    assert call.sink.observed["admission_wait_seconds",] == [3]
    assert call.sink.observed["time_to_first_chunk_seconds",] == [4]
    assert call.sink.observed["first_chunk_after_grant_seconds",] == [1]
    assert call.sink.observed["prompt_latency_seconds",] == [4]
    assert call.sink.observed["chunk_stage_seconds", "transfer"] == [0.125]
    assert call.count("frames_sent_total") == 4
    assert call.count("frame_bytes_sent_total") == 12
    assert call.count("video_seconds_total") == 0.25
    assert (call.count("credits_outstanding"), call.count("unacknowledged_chunks")) == (1, 1)
    await call.asks(ack=pb.Ack(chunk_index=0))
    assert (call.count("credits_outstanding"), call.count("unacknowledged_chunks")) == (2, 0)
    call.sends(1)
    assert call.count("server_starved_client_chunks_total") == 1
    call.clock.now_s += 6
    call.tells(session_ended=pb.SessionEnded())
    call.meter.close()
    assert call.count("sessions", "streaming") == 0
    assert call.count("sessions_finished_total", "served") == 1
    assert call.sink.observed["session_length_seconds",] == [7]
    assert (call.count("credits_outstanding"), call.count("unacknowledged_chunks")) == (0, 0)


async def test_a_pause_is_a_state_and_no_deadline_is_missed_in_it() -> None:
    call = Call()
    await config(call)
    call.starts()
    call.sends(0)
    await call.asks(pause=pb.Pause())
    assert call.count("sessions", "paused") == 1
    call.clock.now_s += 100
    await call.asks(resume=pb.Resume())
    assert call.count("sessions", "streaming") == 1
    call.sends(1)
    assert call.count("deadline_misses_total") == 0
    call.clock.now_s += 100
    call.sends(2)
    assert call.count("deadline_misses_total") == 1


async def test_waiting_for_credit_is_the_clients_doing() -> None:
    call = Call()
    await config(call)
    call.starts()
    call.sends(0)
    call.clock.now_s += 5
    call.sends(1, made=chunk(1, credit_wait_s=4.5))
    assert call.count("client_starved_server_chunks_total") == 1
    assert call.count("credit_wait_seconds_total") == 4.5
    assert call.sink.observed["realtime_factor_ratio",] == [0.5]
    assert call.count("deadline_misses_total") == 0


async def test_a_call_without_acks_has_no_credit_to_count() -> None:
    call = Call()
    call.meter.configured(pb.SessionConfig(prompt=pb.PromptUpdate(prompt_id="first")))
    call.tells(session_started=pb.SessionStarted())
    for index in range(3):
        call.sends(index)
        assert (call.count("credits_outstanding"), call.count("unacknowledged_chunks")) == (0, 0)
    call.tells(session_ended=pb.SessionEnded())
    assert (call.count("credits_outstanding"), call.count("unacknowledged_chunks")) == (0, 0)
    assert call.count("chunks_sent_total") == 3
    assert call.count("server_starved_client_chunks_total") == 0


async def test_the_latency_of_a_later_prompt_counts_from_its_arrival_and_a_superseded_one_has_none() -> None:
    call = Call()
    await config(call)
    call.starts()
    call.sends(0)
    call.clock.now_s += 1
    await call.asks(prompt=pb.PromptUpdate())
    await call.asks(prompt=pb.PromptUpdate(prompt_id="third"))
    call.tells(prompt_applied=pb.PromptApplied(prompt_id="third", superseded_prompt_ids=["prompt-1"]))
    call.clock.now_s += 2
    call.sends(1, "third")
    call.sends(2, "third")
    assert call.sink.observed["prompt_latency_seconds",] == [0, 2]


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "refused"),
        (grpc.StatusCode.UNAVAILABLE, "failed"),
        (grpc.StatusCode.INTERNAL, "failed"),
        (grpc.StatusCode.INVALID_ARGUMENT, "client"),
        (grpc.StatusCode.ABORTED, "client"),
    ],
)
async def test_errors_are_counted_by_reason_and_outcome(code: grpc.StatusCode, outcome: str) -> None:
    call = Call()
    await config(call)
    error = pb.Error(reason="SOME_REASON")
    error.status.code = code.value[0]
    call.tells(error=error)
    call.meter.close()
    assert call.count("sessions_finished_total", outcome) == 1
    assert call.count("session_errors_total", "SOME_REASON") == 1
    assert call.count("session_rejects_total", "SOME_REASON") == 1
    assert call.count("sessions", "waiting") == 0


async def test_a_cancelled_call_is_the_clients_doing() -> None:
    call = Call()
    await config(call)
    call.starts()
    call.meter.close()
    assert call.count("sessions_finished_total", "client") == 1
    assert call.count("sessions", "streaming") == 0


async def test_drift_and_drops_are_recorded() -> None:
    call = Call()
    await config(call)
    call.starts()
    steady, moved = (LatentStats((mean,) * 16, (1.0,) * 16) for mean in (0.0, 2.0))
    for index in range(60):
        call.sends(index, made=chunk(index, stats=steady))
    assert set(call.sink.observed["latent_drift_score", "mean"]) == {0.0}
    call.sends(60, made=chunk(60, stats=moved))
    assert call.sink.observed["latent_drift_score", "mean"][-1] == pytest.approx(2)
    call.tells(frames_dropped=pb.FramesDropped(frame_count=12))
    assert call.count("frames_dropped_total") == 12


def test_a_late_chunk_sets_the_viewers_clock_again() -> None:
    deadlines = Deadlines()
    assert deadlines.sent(1.0, 0.0, 0.0) is None
    assert deadlines.sent(1.0, 1.0 + START_BUFFER_S, 0.0) == (pytest.approx(1 / (1 + START_BUFFER_S)), False)
    pace = deadlines.sent(1.0, 4.0, 0.0)
    assert pace is not None
    assert pace[1]
    assert deadlines.sent(1.0, 5.0 + START_BUFFER_S, 0.0) == (pytest.approx(1 / 1.5), False)
    fast = deadlines.sent(1.0, 5.0 + START_BUFFER_S, 0.0)
    assert fast is not None
    assert math.isfinite(fast[0])


async def test_a_real_session_is_recorded_without_its_help() -> None:
    sink, backends, client = MemorySink(), FakeBackends(), Client()
    meter = SessionMeter(Recorder(sink))
    session = LiveSession(
        "session-1", backends.service, backends, StreamInput(meter.watch(client), backends.service), meter=meter
    )
    client.config()
    async for message in session.messages():
        meter.sent(message)
        if message.frame.last_in_chunk:
            client.ack(message.frame.chunk_index)
            if message.frame.chunk_index == 2:
                client.half_close()
    meter.close()
    assert sink.values["sessions_finished_total", "served"] == 1
    chunks = sink.values["chunks_sent_total",]
    assert chunks >= 3
    for stage in ("queue", "transfer", "send"):
        assert len(sink.observed["chunk_stage_seconds", stage]) >= chunks
    assert sink.values["credits_outstanding",] == 0


async def test_a_move_is_counted_with_its_interruption() -> None:
    call = Call()
    await config(call)
    call.starts()
    moved = pb.SessionMoved(chunk_index=3, reason="GENERATOR_LOST")
    moved.interruption.FromMilliseconds(1500)
    call.tells(session_moved=moved)
    assert call.count("session_moves_total") == 1
    assert call.sink.observed["session_interruption_seconds",] == [1.5]


@pytest.mark.parametrize(
    ("code", "reason", "outcome"),
    [
        (grpc.StatusCode.UNAVAILABLE, "REPLICA_DRAINING", "refused"),
        (grpc.StatusCode.UNAVAILABLE, "DEVICE_FAULT", "failed"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_SESSION_SLOT", "refused"),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PROMPT", "client"),
    ],
)
async def test_an_error_is_counted_by_whose_it_is(code: grpc.StatusCode, reason: str, outcome: str) -> None:
    call = Call()
    await config(call)
    call.tells(error=pb.Error(status={"code": code.value[0]}, reason=reason))
    assert call.count("sessions_finished_total", outcome) == 1
    assert call.count("session_errors_total", reason) == call.count("session_rejects_total", reason) == 1


async def test_a_prompt_that_is_refused_has_no_latency() -> None:
    call = Call()
    await config(call)
    call.starts()
    call.sends(0)
    await call.asks(prompt=pb.PromptUpdate(prompt_id="second"))
    call.tells(prompt_refused=pb.PromptRefused(prompt_id="second"))
    call.sends(1, "second")
    assert len(call.sink.observed["prompt_latency_seconds",]) == 1
