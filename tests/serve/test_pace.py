"""When a generator begins the next chunk, in virtual time."""

from __future__ import annotations

import pytest

from serve.pace import CATCH_UP_S, Pace


def begin_times(pace: Pace, chunk_s: float, chunks: int, start_s: float = 100.0) -> list[float]:
    """Run chunks of four frames that take a time each; return when each began."""
    now_s, began = start_s, []
    for _ in range(chunks):
        now_s += pace.wait_s(now_s)
        began.append(now_s - start_s)
        pace.count(4, now_s)
        now_s += chunk_s
    return began


def test_a_fast_generator_keeps_the_time_of_the_video_less_the_lead() -> None:
    assert begin_times(Pace(16, 0.25), 0.1, 6) == pytest.approx([0, 0.1, 0.25, 0.5, 0.75, 1.0])
    assert begin_times(Pace(16, 0.0), 0.1, 4) == pytest.approx([0, 0.25, 0.5, 0.75])


def test_the_frame_rate_decides() -> None:
    assert begin_times(Pace(8, 0.0), 0.1, 3) == pytest.approx([0, 0.5, 1.0])


def test_as_fast_as_possible_never_waits() -> None:
    assert begin_times(Pace(None, 0.25), 0.1, 4) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_slow_generator_never_waits() -> None:
    assert begin_times(Pace(16, 0.0), 0.4, 4) == pytest.approx([0, 0.4, 0.8, 1.2])


def test_a_short_delay_is_made_up_for() -> None:
    pace = Pace(16, 0.0)
    pace.count(4, 0.0)
    pace.count(4, 0.25 + 0.5)
    assert pace.wait_s(0.8) == 0
    pace.count(4, 0.8)
    assert pace.wait_s(0.8) == 0


def test_a_long_delay_is_not() -> None:
    pace = Pace(16, 0.0)
    pace.count(4, 0.0)
    late_s = 0.25 + CATCH_UP_S + 0.1
    pace.count(4, late_s)
    assert pace.wait_s(late_s) == pytest.approx(0.25)


def test_a_pause_is_not_made_up_for() -> None:
    pace = Pace(16, 0.0)
    pace.count(4, 0.0)
    pace.resume(0.75)
    pace.count(4, 0.75)
    assert pace.wait_s(0.75) == pytest.approx(0.25)
