"""Watches one session: follows a script, writes the frames, and measures what a viewer would feel."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from causal_forcing.geometry import FRAMES_PER_SECOND
from causal_forcing.prompts import PromptUpdate
from causal_forcing.script import ScriptLine
from serve.client import (
    Ended,
    Ending,
    Event,
    Frame,
    FramesDropped,
    Moved,
    PromptApplied,
    PromptRefused,
    Queued,
    Reconnecting,
    Started,
    VideoSession,
)
from serve.commands.live_line import LiveLine
from serve.metrics.client import ClientMeter

if TYPE_CHECKING:
    from serve.commands.recording import Recorder
    from serve.commands.typed import Typed

UNTRAINED = "model {} has random weights: the video shows noise, not the prompt"


@dataclass
class Measured:
    """What a viewer felt, in seconds since the session was asked for.

    Attributes:
        asked_s: Clock when the session was asked for.
        started_s: Until a generator was there, or None.
        first_chunk_s: Until the first chunk was complete (TTFC), or None.
        last_frame_s: Until the newest frame.
        first_chunk_frames: Frames of the first chunk.
        frames: Frames so far.
        data_bytes: Bytes of frames so far.
        prompt_latencies_s: From sending each prompt to its first frame.
        denoise_s: Of each chunk.
        decode_s: Of each chunk.
        dropped_frames: Frames that were missed.
        nominal_fps: Frames a second at which the video is meant to be shown.
    """

    asked_s: float = field(default_factory=time.perf_counter)
    started_s: float | None = None
    first_chunk_s: float | None = None
    last_frame_s: float = 0.0
    first_chunk_frames: int = 0
    frames: int = 0
    data_bytes: int = 0
    prompt_latencies_s: list[float] = field(default_factory=list)
    denoise_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    dropped_frames: int = 0
    nominal_fps: int = FRAMES_PER_SECOND

    def now_s(self) -> float:
        """Return the seconds since the session was asked for."""
        return time.perf_counter() - self.asked_s

    @property
    def fps(self) -> float:
        """Frames a second after the first chunk; 0 before the second."""
        elapsed_s = self.last_frame_s - (self.first_chunk_s or 0.0)
        return (self.frames - self.first_chunk_frames) / elapsed_s if elapsed_s > 0 else 0.0

    def add(self, frame: Frame) -> None:
        """Note a frame."""
        self.frames += 1
        self.data_bytes += len(frame.data)
        self.last_frame_s = self.now_s()
        if frame.timings is None:
            return
        self.denoise_s.append(frame.timings.denoise_s)
        self.decode_s.append(frame.timings.decode_s)
        if self.first_chunk_s is None:
            self.first_chunk_s, self.first_chunk_frames = self.last_frame_s, self.frames

    def summary(self) -> str:
        """Return the numbers for people, a line each."""
        ttfc = "-" if self.first_chunk_s is None else f"{self.first_chunk_s:.3f} s"
        waited = "" if self.started_s is None else f" (of which {self.started_s:.3f} s until a generator was there)"
        latencies = ", ".join(f"{latency:.3f} s" for latency in self.prompt_latencies_s) or "- (no switch)"
        video_s = self.frames / self.nominal_fps
        dropped = f", {self.dropped_frames} frames dropped" if self.dropped_frames else ""
        return (
            f"frames          {self.frames} ({video_s:.2f} s of video, {self.data_bytes / 1e6:.2f} MB{dropped})\n"
            f"TTFC            {ttfc}{waited}\n"
            f"FPS             {self.fps:.1f} ({self.fps / self.nominal_fps:.2f} x real time)\n"
            f"prompt latency  {latencies}"
        )


class Viewer:
    """Takes a session's events.

    Args:
        lines: Prompts to send when their time in the video comes.
        max_frames: Length of the video; None until the session ends.
        quiet: Whether to say nothing of what happens.
        fps: Frames a second at which the video is meant to be shown.
        live_line: Where live numbers are shown, if anywhere.

    Attributes:
        measured: What was measured.
        prompts: Where each prompt took effect.
        recorder: Where frames go, if anywhere.
        meter: Sees all events, too.
    """

    def __init__(
        self,
        lines: Sequence[ScriptLine],
        max_frames: int | None,
        *,
        quiet: bool,
        fps: int = FRAMES_PER_SECOND,
        live_line: LiveLine | None = None,
    ) -> None:
        self._fps = fps
        self.measured = Measured(nominal_fps=fps)
        self.prompts: list[PromptApplied] = []
        self._lines = deque(lines)
        self._max_frames = max_frames
        self.recorder: Recorder | None = None
        self.meter = ClientMeter()
        self._quiet = quiet
        self._live_line = live_line
        self._sent: dict[str, float] = {}

    def watch(self, session: VideoSession, typed: Typed | None = None) -> None:
        """Follow the session until there are enough frames.

        Args:
            session: What to follow.
            typed: Passes on what is typed meanwhile.

        Raises:
            VideoServiceError: If the session fails.
        """
        self.measured = Measured(nominal_fps=self._fps)
        if typed is not None:
            typed.start(session)
        try:
            for event in session:
                self.meter.saw(event)
                self._take(event)
                self._send_due(session)
                is_long_enough = self._max_frames is not None and self.measured.frames >= self._max_frames
                if is_long_enough or isinstance(event, Ended):
                    return
        finally:
            if typed is not None:
                typed.stop()
            if self._live_line is not None:
                self._live_line.clear()

    def send(self, session: VideoSession, update: PromptUpdate) -> None:
        """Send a prompt that has a name, and measure how long it takes to show."""
        self._sent[update.prompt_id] = self.measured.now_s()
        session.update_prompt(update)

    def finish_in(self, seconds: float) -> None:
        """Let the video end after so much more of it, unless it has a length already."""
        if self._max_frames is None:
            self._max_frames = self.measured.frames + round(seconds * self._fps)

    def say(self, text: str) -> None:
        """Tell people something, unless they want quiet."""
        if self._quiet:
            return
        if self._live_line is not None:
            self._live_line.clear()
        print(text, file=sys.stderr)

    def _take(self, event: Event) -> None:
        measured = self.measured
        match event:
            case Queued():
                if event.sessions_ahead or event.waited_s > 1:
                    self.say(f"waiting for a generator: {event.sessions_ahead} ahead, {event.waited_s:.0f} s")
            case Started():
                measured.started_s = measured.now_s()
                self._started(event)
            case PromptApplied():
                self.prompts.append(event)
                self.say(f"prompt {event.prompt_id} takes effect at chunk {event.chunk_index}")
            case PromptRefused():
                self._sent.pop(event.prompt_id, None)
                self.say(f"prompt {event.prompt_id} is refused ({event.reason}): {event.message}")
            case FramesDropped():
                measured.dropped_frames += event.frame_count
            case Moved():
                self.say(f"the generator was lost ({event.reason}); it went on after {event.interruption_s:.1f} s")
            case Reconnecting():
                lost = event.error.reason or event.error.code.name
                self.say(f"the session was lost ({lost}); a new one in {event.wait_s:.1f} s")
            case Ending():
                self.say(f"the session ends in {event.remaining_s:.0f} s")
            case Frame():
                self._frame(event)

    def _started(self, event: Started) -> None:
        name = event.model.name
        if not event.model.trained:
            self.say(UNTRAINED.format(name))
        if self.recorder is not None:
            self.recorder.metadata["title"] = f"Causal Forcing, preset {name}"
            if not event.model.trained:
                self.recorder.metadata["comment"] = "RANDOM WEIGHTS: this model has not been trained."

    def _frame(self, frame: Frame) -> None:
        measured = self.measured
        measured.add(frame)
        sent_s = self._sent.pop(frame.prompt_id, None)
        if sent_s is not None:
            measured.prompt_latencies_s.append(measured.last_frame_s - sent_s)
        if self.recorder is not None:
            self.recorder.take(frame)
        if self._live_line is not None and measured.denoise_s:
            dropped = f", {measured.dropped_frames} dropped" if measured.dropped_frames else ""
            chunk = f", chunk {measured.denoise_s[-1] * 1e3:.0f} ms, decode {measured.decode_s[-1] * 1e3:.0f} ms"
            self._live_line.show(measured.last_frame_s, measured.frames, measured.data_bytes, chunk + dropped)

    def _send_due(self, session: VideoSession) -> None:
        """Send the prompts whose time has come, by the video's clock."""
        while self._lines and self.measured.frames >= self._lines[0].time_s * self._fps:
            self.send(session, self._lines.popleft().update)
