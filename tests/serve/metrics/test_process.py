"""What a process measures of itself."""

from __future__ import annotations

import gc

import pytest
import torch

from causal_forcing.errors import InvalidRequest
from serve.config import load_config
from serve.metrics import MemorySink, Recorder, Role
from serve.metrics.generator import GeneratorMeter
from serve.metrics.process import CollectorWatch, ProcessMeter, measure_gpu
from tests.serve.fakes import chunk


class Clock:
    """A clock that is set."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_look_records_cost_pauses_and_streaming_time() -> None:
    sink, clock = MemorySink(), Clock()
    recorder = Recorder(sink)
    looked: list[float] = []
    meter = ProcessMeter(recorder, price_per_hour=7.2, currency="EUR", also=(looked.append,), clock=clock)
    recorder.session_state(None, "waiting")
    recorder.session_state("waiting", "streaming")
    recorder.session_state(None, "streaming")
    recorder.session_state("streaming", "paused")
    clock.now_s += 5
    meter.tick()
    assert sink.values["cost_total", "EUR"] == pytest.approx(0.01)
    assert sink.values[("streaming_seconds_total",)] == pytest.approx(10)
    assert sink.values["sessions", "streaming"] == 1
    assert sink.values["sessions", "paused"] == 1
    assert sink.values["sessions", "waiting"] == 0
    assert looked == [5]


def test_collections_are_added_up_and_the_longest_kept() -> None:
    clock = Clock()
    watch = CollectorWatch(clock)
    for pause_s in (0.5, 0.25):
        watch("start", {})
        clock.now_s += pause_s
        watch("stop", {})
    assert watch.take() == (0.75, 0.5)
    assert watch.take() == (0.0, 0.0)


def test_python_calls_the_watch() -> None:
    watch = CollectorWatch()
    gc.callbacks.append(watch)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(watch)
    assert watch.take()[0] > 0


def test_a_generators_time_is_busy_held_or_idle() -> None:
    sink, clock = MemorySink(), Clock()
    meter = GeneratorMeter(Recorder(sink), clock)
    clock.now_s += 1
    meter.leased()
    clock.now_s += 2
    with meter.at_work():
        clock.now_s += 4
        meter.look()
        clock.now_s += 4
    meter.made(chunk(0, denoise_s=0.5, context_s=0.125, recaches=2), "session-1", 77)
    clock.now_s += 16
    assert sink.values["cache_bytes", "kv"] == 77
    meter.freed("session-1")
    clock.now_s += 32
    meter.look()
    spent = {state: sink.values["generator_seconds_total", state] for state in ("busy", "held", "idle")}
    assert spent == {"busy": 8, "held": 18, "idle": 33}
    assert sink.values[("recaches_total",)] == 2
    assert sink.observed == {
        ("chunk_stage_seconds", "denoise"): [0.375],
        ("chunk_stage_seconds", "context"): [0.125],
    }
    assert sink.values["cache_bytes", "kv"] == 0


@pytest.mark.parametrize("busy", [75, None])
def test_a_gpu_whose_driver_does_not_say_how_busy_it_is_tells_its_memory(
    monkeypatch: pytest.MonkeyPatch, busy: int | None
) -> None:
    pynvml = pytest.importorskip("pynvml")

    def utilisation() -> int:
        if busy is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return busy

    for name, found in {
        "mem_get_info": lambda: (1, 4),
        "memory_allocated": lambda: 2,
        "memory_reserved": lambda: 3,
        "utilization": utilisation,
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)
    sink = MemorySink()
    measure_gpu(Recorder(sink))
    assert [sink.values["gpu_memory_bytes", kind] for kind in ("free", "allocated", "reserved", "total")] == [
        1,
        2,
        3,
        4,
    ]
    assert sink.values.get(("gpu_utilisation_ratio",)) == (None if busy is None else 0.75)


def test_a_price_that_is_not_one_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"observability.price_per_replica_hour.generator"):
        load_config(None, observability={"price_per_replica_hour": {"generator": -1}})
    with pytest.raises(InvalidRequest, match=r"observability.currency"):
        load_config(None, observability={"currency": "dollars"})
    config = load_config(None, observability={"price_per_replica_hour": {"vae_decoder": 2.5}})
    assert config.observability.price_per_replica_hour.of(Role.DECODER) == 2.5
