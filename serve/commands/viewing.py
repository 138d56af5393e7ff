"""Watches one session: follows a script, writes the frames, and measures what a viewer would feel."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from causal_forcing.geometry import FRAMES_PER_SECOND
from causal_forcing.script import ScriptLine
from serve.client import Ended, Event, Frame, Moved, PromptApplied, PromptRefused, Queued, Started, VideoSession

if TYPE_CHECKING:
    from causal_forcing.media import Frames

UNTRAINED = "model {} has random weights: the video shows noise, not the prompt"


class FrameSink(Protocol):
    """Where frames go, e.g. a :class:`causal_forcing.media.FrameWriter`.

    Attributes:
        metadata: Texts stored with the frames, filled before the first one.
    """

    metadata: dict[str, str]

    def write(self, frames: Frames) -> None:
        """Take ``[f, H, W, 3]`` uint8 RGB."""
        ...


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
        video_s = self.frames / FRAMES_PER_SECOND
        return (
            f"frames          {self.frames} ({video_s:.2f} s of video, {self.data_bytes / 1e6:.2f} MB)\n"
            f"TTFC            {ttfc}{waited}\n"
            f"FPS             {self.fps:.1f} ({self.fps / FRAMES_PER_SECOND:.2f} x real time)\n"
            f"prompt latency  {latencies}"
        )


class Viewer:
    """Takes a session's events.

    Attributes:
        measured: What was measured.
        prompts: Where each prompt took effect.
        sink: Where frames go, if anywhere.
    """

    def __init__(self, lines: Sequence[ScriptLine], max_frames: int, *, quiet: bool) -> None:
        self.measured = Measured()
        self.prompts: list[PromptApplied] = []
        self._lines = deque(lines)
        self._max_frames = max_frames
        self.sink: FrameSink | None = None
        self._quiet = quiet
        self._sent: dict[str, float] = {}

    def watch(self, session: VideoSession) -> None:
        """Follow the session until there are enough frames.

        Raises:
            VideoServiceError: If the session fails.
        """
        self.measured = Measured()
        for event in session:
            self._take(event)
            self._send_due(session)
            if self.measured.frames >= self._max_frames or isinstance(event, Ended):
                return

    def _take(self, event: Event) -> None:
        measured = self.measured
        match event:
            case Queued():
                if event.sessions_ahead or event.waited_s > 1:
                    self._say(f"waiting for a generator: {event.sessions_ahead} ahead, {event.waited_s:.0f} s")
            case Started():
                measured.started_s = measured.now_s()
                self._started(event)
            case PromptApplied():
                self.prompts.append(event)
                self._say(f"prompt {event.prompt_id} takes effect at chunk {event.chunk_index}")
            case PromptRefused():
                self._sent.pop(event.prompt_id, None)
                self._say(f"prompt {event.prompt_id} is refused ({event.reason}): {event.message}")
            case Moved():
                self._say(f"the generator was lost ({event.reason}); it went on after {event.interruption_s:.1f} s")
            case Frame():
                self._frame(event)

    def _started(self, event: Started) -> None:
        name = event.model.name
        if not event.model.trained:
            self._say(UNTRAINED.format(name))
        if self.sink is not None:
            self.sink.metadata["title"] = f"Causal Forcing, preset {name}"
            if not event.model.trained:
                self.sink.metadata["comment"] = "RANDOM WEIGHTS: this model has not been trained."

    def _frame(self, frame: Frame) -> None:
        self.measured.add(frame)
        sent_s = self._sent.pop(frame.prompt_id, None)
        if sent_s is not None:
            self.measured.prompt_latencies_s.append(self.measured.last_frame_s - sent_s)
        if self.sink is not None:
            self.sink.write(frame.pixels()[None])

    def _send_due(self, session: VideoSession) -> None:
        """Send the prompts whose time has come, by the video's clock."""
        while self._lines and self.measured.frames >= self._lines[0].time_s * FRAMES_PER_SECOND:
            line = self._lines.popleft()
            sent_s = self.measured.now_s()
            self._sent[session.update_prompt(line.update)] = sent_s

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr)
