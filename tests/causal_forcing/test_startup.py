"""The phases of a cold start: that each is counted once, under its name, in order."""

import pytest

from causal_forcing.startup import StartUp


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told otherwise."""
    now = [0.0]
    monkeypatch.setattr("causal_forcing.startup.time.perf_counter", lambda: now[0])
    return now


def test_phases_add_up_and_are_told_in_order(clock):
    startup = StartUp()
    startup.add("import", 2.0)
    with startup.phase("load"):
        clock[0] += 0.5
    for _ in range(2):
        with startup.phase("compile"):
            clock[0] += 4.0
    assert startup.phases == {"import": 2.0, "load": 0.5, "compile": 8.0}
    assert str(startup) == "10.50 s (import 2.00, load 0.50, compile 8.00)"


def test_a_phase_that_fails_counts(clock):
    startup = StartUp()

    def fail():
        clock[0] += 1.0
        raise InterruptedError

    with pytest.raises(InterruptedError), startup.phase("load"):
        fail()
    assert startup.phases == {"load": 1.0}
