"""What a client measures of its sessions, through prometheus-client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.client import Ended, Event, Frame

from .definitions import Role
from .recorder import SILENT, Recorder
from .served import served_metrics


class ClientMeter:
    """Sees one session's events and tells the recorder.

    Args:
        recorder: Where it goes.
        clock: Seconds on a clock that only goes forward.
    """

    def __init__(self, recorder: Recorder = SILENT, clock: Callable[[], float] = time.monotonic) -> None:
        self._recorder = recorder
        self._clock = clock
        self._asked_s = clock()
        self._chunk_s: float | None = None
        self._has_frames = self._is_over = False

    def saw(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, Ended):
            self.ended()
        elif isinstance(event, Frame):
            self._frame(event)

    def ended(self, *, failed: bool = False) -> None:
        """Take note of the session's end, once."""
        if not self._is_over:
            self._is_over = True
            self._recorder.client_session(failed=failed)

    def _frame(self, frame: Frame) -> None:
        now_s = self._clock()
        if not self._has_frames:
            self._has_frames = True
            self._recorder.client_first_frame(now_s - self._asked_s)
        self._recorder.client_frame(len(frame.data))
        if frame.last_in_chunk:
            if self._chunk_s is not None:
                self._recorder.client_chunk(now_s - self._chunk_s)
            self._chunk_s = now_s


@contextmanager
def client_metrics(port: int) -> Iterator[Recorder]:
    """Serve a client's metrics at ``http://127.0.0.1:port/metrics`` for as long as the block runs.

    Raises:
        InvalidRequest: If the port cannot be had (field ``metrics_port``).
    """
    with served_metrics(port, Role.CLIENT) as recorder:
        yield recorder
