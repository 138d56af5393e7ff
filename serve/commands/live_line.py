"""One line of live numbers, rewritten in place below what is printed."""

from __future__ import annotations

from collections import deque
from typing import TextIO

SHOW_EVERY_S = 0.25
RATES_OVER_S = 2.0
"""Over how long rates are taken."""

CLEAR = "\r\x1b[K"


class LiveLine:
    """Shows frames a second, bits a second and where the time goes.

    Args:
        stream: A terminal.
        fps: Frames a second at which the video is meant to be shown.
    """

    def __init__(self, stream: TextIO, fps: int) -> None:
        self._stream = stream
        self._fps = fps
        self._past: deque[tuple[float, int, int]] = deque()
        self._shown_s = float("-inf")
        self._is_shown = False

    def show(self, now_s: float, frames: int, data_bytes: int, extra: str) -> None:
        """Show the numbers, unless that was done just before.

        Args:
            now_s: Clock of the session.
            frames: Frames so far.
            data_bytes: Bytes of frames so far.
            extra: What else there is to say.
        """
        self._past.append((now_s, frames, data_bytes))
        while now_s - self._past[0][0] > RATES_OVER_S:
            self._past.popleft()
        if now_s - self._shown_s < SHOW_EVERY_S:
            return
        self._shown_s, self._is_shown = now_s, True
        then_s, frames_then, bytes_then = self._past[0]
        elapsed_s = now_s - then_s
        rates = "starting"
        if elapsed_s > 0:
            mbit = (data_bytes - bytes_then) * 8e-6 / elapsed_s
            rates = f"{(frames - frames_then) / elapsed_s:.1f} FPS, {mbit:.2f} Mbit/s"
        self._stream.write(f"{CLEAR}{frames / self._fps:.1f} s of video, {rates}{extra}")
        self._stream.flush()

    def clear(self) -> None:
        """Make room for a line that stays."""
        if self._is_shown:
            self._stream.write(CLEAR)
            self._stream.flush()
            self._is_shown = False
