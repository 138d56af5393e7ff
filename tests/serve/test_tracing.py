"""Traces of sessions, as a collector gets them over OTLP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import grpc
import pytest

from causal_forcing.errors import InvalidRequest
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.config import TracingConfig, load_config
from serve.gateway.inputs import StreamInput
from serve.gateway.session import LiveSession
from serve.gateway.session_meter import SessionMeter
from serve.messages import Decoded
from serve.tracing import UNTRACED, Tracing
from tests.serve.collector import Collector, collecting
from tests.serve.fakes import Client, FakeBackends, chunk

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SECRET = "a fox that nobody may know of"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")]
NOT_SAMPLED = [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00")]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector in this process."""
    with collecting() as collector:
        yield collector


@contextmanager
def tracing_to(collector: Collector, **options: Any) -> Iterator[Tracing]:
    tracing = Tracing(TracingConfig(endpoint=f"127.0.0.1:{collector.port}", **options), "gateway-1")
    yield tracing
    tracing.close()


async def run_session(tracing: Tracing, metadata: list[tuple[str, str]]) -> int:
    """Run a session of three chunks or more through the fakes; return how many were sent."""
    backends, client, chunks = FakeBackends(), Client(), 0
    meter = SessionMeter(trace=tracing.session(metadata))
    session = LiveSession(
        "session-1", backends.service, backends, StreamInput(meter.watch(client), backends.service), meter=meter
    )
    client.config(SECRET)
    async for message in session.messages():
        meter.sent(message)
        if message.frame.last_in_chunk:
            chunks += 1
            client.ack(message.frame.chunk_index)
            if message.frame.chunk_index == 2:
                client.half_close()
    meter.close()
    return chunks


async def test_a_session_is_one_trace_with_spans_for_chunks_and_stages(collector: Collector) -> None:
    with tracing_to(collector) as tracing:
        chunks = await run_session(tracing, SAMPLED)
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    (session,) = collector.named("session")
    assert session.parent_span_id.hex() == PARENT_ID
    inside = collector.inside(session)
    assert [span.name for span in inside] == ["wait", *["chunk"] * chunks]
    for span in inside[1:]:
        assert {"denoise", "context", "queue", "decoder call", "send"} <= {s.name for s in collector.inside(span)}
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= session.end_time_unix_nano
    attributes = {a.key: a.value.string_value for a in collector.requests[0].resource_spans[0].resource.attributes}
    assert (attributes["service.name"], attributes["service.instance.id"]) == ("causal-forcing", "gateway-1")


async def test_stages_lie_where_the_times_of_a_chunk_say(collector: Collector) -> None:
    with tracing_to(collector) as tracing:
        trace = tracing.session([])
        trace.configured()
        trace.started("s")
        trace.chunk(chunk(0, denoise_s=0.5, context_s=0.125), Decoded("d", (), 0.25, 0.125, 0.0625), 0.5)
        trace.sent(0)
        trace.close()
    (span,) = collector.named("chunk")
    lengths = {s.name: (s.end_time_unix_nano - s.start_time_unix_nano) / 1e9 for s in collector.spans}
    assert lengths["denoise"] == 0.375
    assert lengths["context"] == 0.125
    assert lengths["decoder call"] == 0.5
    assert (lengths["prime"], lengths["decode"], lengths["encode"]) == (0.0625, 0.25, 0.125)
    stages = collector.inside(span)
    assert [s.name for s in stages] == ["denoise", "context", "queue", "decoder call", "send"]
    for earlier, later in pairwise(stages):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    (call,) = collector.named("decoder call")
    inner = collector.inside(call)
    assert [s.name for s in inner] == ["prime", "decode", "encode"]
    assert call.start_time_unix_nano < inner[0].start_time_unix_nano
    assert inner[-1].end_time_unix_nano < call.end_time_unix_nano


async def test_a_chunk_that_was_dropped_and_a_move_and_an_error_are_seen(collector: Collector) -> None:
    with tracing_to(collector) as tracing:
        meter = SessionMeter(trace=tracing.session([]))
        meter.configured(pb.SessionConfig())
        meter.sent(pb.StreamVideoResponse(session_started=pb.SessionStarted(session_id="s-1")))
        for index in range(2):
            meter.chunk(chunk(index), Decoded("d", ()), 0.0)
        meter.sent(pb.StreamVideoResponse(session_moved=pb.SessionMoved(reason="DEVICE_FAULT")))
        meter.sent(pb.StreamVideoResponse(frame=pb.VideoFrame(chunk_index=1, part_count=1, last_in_chunk=True)))
        failed = pb.Error(reason="DEVICE_FAULT", status={"code": grpc.StatusCode.UNAVAILABLE.value[0]})
        meter.sent(pb.StreamVideoResponse(error=failed))
        meter.close()
    dropped = [any(a.key == "causal_forcing.dropped" for a in s.attributes) for s in collector.named("chunk")]
    assert sorted(dropped) == [False, True]
    (session,) = collector.named("session")
    assert [event.name for event in session.events] == ["moved"]
    assert (session.status.code, session.status.message) == (2, "DEVICE_FAULT")
    assert "s-1" in str(session.attributes)


async def test_a_prompt_is_never_in_a_trace(collector: Collector) -> None:
    with tracing_to(collector) as tracing:
        await run_session(tracing, SAMPLED)
    assert collector.spans
    assert all(SECRET.encode() not in request.SerializeToString() for request in collector.requests)


async def test_a_client_that_does_not_want_to_be_traced_is_not(collector: Collector) -> None:
    with tracing_to(collector) as tracing:
        await run_session(tracing, NOT_SAMPLED)
    assert collector.requests == []


async def test_a_share_of_sessions_is_traced(collector: Collector) -> None:
    with tracing_to(collector, sample_ratio=0.5) as tracing:
        for _ in range(64):
            tracing.session([]).close()
    assert 8 < len(collector.spans) < 56


@pytest.mark.parametrize(
    "metadata", [[("traceparent", "nonsense")], [("traceparent", "00-0-0-01")], [("key-bin", b"x")]]
)
async def test_what_is_no_trace_begins_one(metadata: list[tuple[str, str]], collector: Collector) -> None:
    with tracing_to(collector) as tracing:
        tracing.session(metadata).close()
    (span,) = collector.spans
    assert span.parent_span_id == b""


def test_it_is_off_unless_it_is_configured() -> None:
    assert load_config(None).observability.tracing is None
    assert Tracing(None, "gateway-1").session(SAMPLED) is UNTRACED


@pytest.mark.parametrize(
    ("field", "value"), [("endpoint", "http://x:1/"), ("endpoint", "x"), ("sample_ratio", 0), ("sample_ratio", 1.5)]
)
def test_a_wrong_configuration_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field):
        load_config(None, observability={"tracing": {"endpoint": "collector:4317", field: value}})
