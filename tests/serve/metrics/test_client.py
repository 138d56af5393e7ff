"""What a client measures of its sessions."""

from __future__ import annotations

import urllib.request

import pytest

from causal_forcing.errors import InvalidRequest
from serve.client import ChunkTimings, Ended, Frame
from serve.local import free_port
from serve.metrics import MemorySink, Recorder
from serve.metrics.client import ClientMeter, client_metrics


class Clock:
    now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


def frame(*, last: bool) -> Frame:
    timings = ChunkTimings(0.0, 0.0, 0.0, 0.0) if last else None
    return Frame(0, 0, "p", b"12345", "jpeg", 1, 1, timings)


def test_frames_chunks_and_the_end_are_seen() -> None:
    sink, clock = MemorySink(), Clock()
    meter = ClientMeter(Recorder(sink), clock)
    for seconds, last in ((2.0, False), (0.0, True), (0.5, False), (0.25, True)):
        clock.now_s += seconds
        meter.saw(frame(last=last))
    assert sink.observed["client_time_to_first_frame_seconds",] == [2]
    assert sink.observed["client_chunk_interval_seconds",] == [0.75]
    assert (sink.values["client_frames_total",], sink.values["client_frame_bytes_total",]) == (4, 20)
    meter.saw(Ended("CLIENT", 2, 4, 20, 3.0))
    meter.ended(failed=True)
    assert sink.values == {**sink.values, ("client_sessions_total", "ended"): 1}
    assert ("client_sessions_total", "error") not in sink.values


def test_the_port_serves_them_while_it_is_wanted() -> None:
    port = free_port()
    with client_metrics(port) as recorder:
        ClientMeter(recorder).ended(failed=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        with pytest.raises(InvalidRequest, match="metrics_port"), client_metrics(port):
            pass
    assert 'causal_forcing_client_sessions_total{outcome="error"} 1.0' in text
    assert "causal_forcing_client_frames_total 0.0" in text
    with client_metrics(port):
        pass
