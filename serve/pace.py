"""When a generator begins the next chunk of a session that is shown at a steady rate: arithmetic over a given clock."""

from __future__ import annotations

CATCH_UP_S = 1.0
"""A video that is late by more than this goes on from where it is, instead of hurrying after the clock."""


class Pace:
    """The clock of one session's video. The first chunk begins it.

    Args:
        frames_per_second: Rate at which the video is shown; None is as fast as possible.
        lead_s: How much earlier than at its time a chunk may be begun.
    """

    def __init__(self, frames_per_second: float | None, lead_s: float) -> None:
        self._frames_per_second = frames_per_second
        self._lead_s = lead_s
        self._due_s: float | None = None

    def wait_s(self, now_s: float) -> float:
        """Return how long to wait before the next chunk; 0 when it may begin."""
        if self._frames_per_second is None or self._due_s is None:
            return 0.0
        return max(0.0, self._due_s - self._lead_s - now_s)

    def count(self, frames: int, began_s: float) -> None:
        """Note a chunk of so many pixel frames that was begun at some time."""
        if self._frames_per_second is None:
            return
        if self._due_s is None or began_s > self._due_s + CATCH_UP_S:
            self._due_s = began_s
        self._due_s += frames / self._frames_per_second

    def resume(self, now_s: float) -> None:
        """Go on after a rest in which the viewer's clock stood still: nothing of it is made up for."""
        if self._due_s is not None:
            self._due_s = max(self._due_s, now_s)
