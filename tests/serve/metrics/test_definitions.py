"""The table of metrics keeps to Prometheus' conventions, and its page is current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from serve.metrics import ALL, Kind, MemorySink, Metric, PrometheusSink, Recorder, Role
from serve.metrics.__main__ import files


@pytest.mark.parametrize("metric", ALL.values(), ids=lambda metric: metric.name)
def test_names_types_and_labels_follow_the_conventions(metric: Metric) -> None:
    assert re.fullmatch("[a-z][a-z0-9_]*", metric.name)
    assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.help[0].isupper() or metric.help.startswith("Seconds")
    assert metric.help.endswith(".")
    assert "seconds" not in metric.unit or "_seconds" in metric.name
    assert metric.unit != "bytes" or "_bytes" in metric.name
    assert set(metric.labels) <= {"state", "outcome", "reason", "stage", "part", "cache", "phase", "kind", "currency"}


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_what_is_made_of_the_table_is_current(path: Path) -> None:
    assert path.read_text() == files()[path], "run: python -m serve.metrics"


def test_the_same_definitions_go_through_prometheus_client() -> None:
    registry = CollectorRegistry()
    recorder = Recorder(PrometheusSink(registry))
    recorder.begin(Role.CLIENT)
    recorder.client_frame(100)
    recorder.client_first_frame(0.3)
    text = generate_latest(registry).decode()
    assert "causal_forcing_client_frame_bytes_total 100.0" in text
    assert 'causal_forcing_client_time_to_first_frame_seconds_bucket{le="0.5"} 1.0' in text
    assert 'causal_forcing_client_sessions_total{outcome="error"} 0.0' in text


def test_counters_with_known_labels_begin_at_zero() -> None:
    sink = MemorySink()
    Recorder(sink).begin(Role.GATEWAY)
    assert sink.values["sessions_finished_total", "refused"] == 0
    assert not [key for key in sink.values if key[0] == "session_errors_total"]


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("sessions_finished_total", ("dead",), "outcome is 'dead', must be one of served, client, refused, failed"),
        ("sessions_finished_total", (), "has the labels outcome"),
        ("sessions", ("waiting",), "sessions is a gauge, not a counter"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(name: str, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MemorySink().add(ALL[name], 1, *labels)
