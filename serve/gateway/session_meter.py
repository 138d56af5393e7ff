"""Measures one client's call from what goes in and out of it, so that the session itself need not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import grpc

from causal_forcing.geometry import FRAMES_PER_SECOND
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.messages import Decoded, GeneratedChunk
from serve.metrics import SILENT, Recorder
from serve.metrics.drift import DriftScore
from serve.tracing import UNTRACED, Trace

START_BUFFER_S = 0.5
"""How far the viewer of the deadlines plays behind the first frame."""

SHORTEST_S = 0.001
"""Least time that a chunk is said to have taken; two can leave the gateway together."""


class Deadlines:
    """A viewer that plays at the session's rate, and what it would have had to wait for."""

    def __init__(self) -> None:
        self._sent_s: float | None = None
        self._due_s = 0.0

    def sent(self, video_s: float, now_s: float, waited_s: float) -> tuple[float, bool] | None:
        """Return a chunk's real-time factor and whether it came too late; None for the first chunk.

        Args:
            video_s: Seconds of video in it.
            now_s: When it was sent.
            waited_s: Part of the time since the last chunk that was the client's own doing.
        """
        if self._sent_s is None:
            self._sent_s, self._due_s = now_s, now_s + START_BUFFER_S + video_s
            return None
        took_s = max(now_s - self._sent_s - waited_s, SHORTEST_S)
        due_s = self._due_s + waited_s
        missed = now_s > due_s
        self._sent_s, self._due_s = now_s, (now_s + START_BUFFER_S if missed else due_s) + video_s
        return video_s / took_s, missed


class SessionMeter:
    """Sees the call's messages, and each chunk on its way, and tells the recorder and the trace."""

    def __init__(
        self, recorder: Recorder = SILENT, clock: Callable[[], float] = time.monotonic, trace: Trace = UNTRACED
    ) -> None:
        self._recorder = recorder
        self._trace = trace
        self._clock = clock
        self._state: str | None = None
        self._config_s: float | None = None
        self._started_s: float | None = None
        self._is_over = False
        self._prompts_s: dict[str, float] = {}
        self._queued_s: deque[tuple[int, float]] = deque()
        self._prompts = 0
        self._paused_s: float | None = None
        self._waited_s = 0.0
        self._frames = self._bytes = 0
        self._rate = float(FRAMES_PER_SECOND)
        self._unacked: deque[int] = deque()
        self._window = 0
        self._deadlines = Deadlines()
        self._drift = DriftScore()

    def watch(self, requests: AsyncIterator[pb.StreamVideoRequest]) -> AsyncIterator[pb.StreamVideoRequest]:
        """Return the same messages, seen on their way."""
        return _Watched(requests, self._received)

    def configured(self, config: pb.SessionConfig) -> None:
        """See what the session shall be."""
        self._config_s = self._clock()
        self._enter("waiting")
        self._trace.configured()
        self._asked(config.prompt)

    def chunk(self, chunk: GeneratedChunk, decoded: Decoded, took_s: float) -> None:
        """See a chunk that the gateway has had decoded and is about to send.

        Args:
            chunk: From the generator.
            decoded: From the decoder.
            took_s: How long the decoder's call took.
        """
        recorder = self._recorder
        recorder.stage("queue", time.time() - took_s - chunk.made_s)
        recorder.stage("transfer", took_s - decoded.decode_s - decoded.encode_s - decoded.prime_s)
        if chunk.credit_wait_s:
            self._waited_s += chunk.credit_wait_s
            recorder.credit_wait(chunk.credit_wait_s)
        if chunk.stats is not None:
            video_s = chunk.frame_count / self._rate
            score = self._drift.update(chunk.stats, video_s, starts_scene=chunk.starts_scene)
            if score is not None:
                recorder.drift(*score)
        self._queued_s.append((chunk.index, self._clock()))
        self._trace.chunk(chunk, decoded, took_s)

    def sent(self, message: pb.StreamVideoResponse) -> None:
        """See a message that the transport has taken."""
        match message.WhichOneof("message"):
            case "frame":
                self._frame_sent(message.frame)
            case "session_started":
                self._started(message.session_started)
            case "prompt_applied":
                for prompt_id in message.prompt_applied.superseded_prompt_ids:
                    self._prompts_s.pop(prompt_id, None)
            case "prompt_refused":
                self._prompts_s.pop(message.prompt_refused.prompt_id, None)
            case "session_moved":
                self._trace.moved(message.session_moved.reason)
                self._recorder.session_moved(message.session_moved.interruption.ToNanoseconds() / 1e9)
            case "frames_dropped":
                self._recorder.frames_dropped(message.frames_dropped.frame_count)
            case "session_ended":
                self._recorder.session_served()
                self._over()
            case "error":
                self._failed(message.error)

    def close(self) -> None:
        """See the end of the call; without a last message it was cancelled."""
        if not self._is_over:
            self._recorder.session_left()
            self._over()
        self._trace.close()

    def _received(self, message: pb.StreamVideoRequest) -> None:
        match message.WhichOneof("message"):
            case "config" if self._config_s is None:
                self.configured(message.config)
            case "prompt":
                self._asked(message.prompt)
            case "ack":
                self._acked(message.ack.chunk_index)
            case "pause" if self._state == "streaming":
                self._paused_s = self._clock()
                self._enter("paused")
            case "resume" if self._paused_s is not None:
                self._waited_s += self._clock() - self._paused_s
                self._paused_s = None
                self._enter("streaming")

    def _asked(self, prompt: pb.PromptUpdate) -> None:
        self._prompts_s[prompt.prompt_id or f"prompt-{self._prompts}"] = self._clock()
        self._prompts += 1

    def _started(self, message: pb.SessionStarted) -> None:
        self._started_s = self._clock()
        self._trace.started(message.session_id)
        self._recorder.session_started(self._started_s - (self._config_s or self._started_s))
        self._enter("streaming")
        config = message.effective_config
        self._rate = float(config.frames_per_second or FRAMES_PER_SECOND)
        self._window = config.credit_chunks  # 0: this call has no acks
        self._recorder.credit(self._window, 0)

    def _failed(self, error: pb.Error) -> None:
        code = next(code for code in grpc.StatusCode if code.value[0] == error.status.code)
        self._trace.failed(error.reason)
        self._recorder.session_failed(code.name, error.reason, started=self._started_s is not None)
        self._over()

    def _frame_sent(self, frame: pb.VideoFrame) -> None:
        self._bytes += len(frame.data)
        self._frames += frame.part_index == frame.part_count - 1
        if frame.last_in_chunk:
            self._chunk_sent(frame.chunk_index, frame.prompt_id)

    def _chunk_sent(self, index: int, prompt_id: str) -> None:
        now_s, recorder = self._clock(), self._recorder
        frames, nbytes, waited_s = self._frames, self._bytes, self._waited_s
        self._frames, self._bytes, self._waited_s = 0, 0, 0.0
        video_s = frames / self._rate
        self._trace.sent(index)
        recorder.chunk_sent(frames, nbytes, video_s)
        while self._queued_s and self._queued_s[0][0] <= index:
            queued, queued_s = self._queued_s.popleft()
            if queued == index:
                recorder.stage("send", now_s - queued_s)
        pace = self._deadlines.sent(video_s, now_s, waited_s)
        if pace is None:
            assert self._started_s is not None
            recorder.first_chunk(now_s - (self._config_s or self._started_s), now_s - self._started_s)
        else:
            recorder.pace(pace[0], missed=pace[1])
            if self._window and not self._unacked:
                recorder.client_was_waiting()
        asked_s = self._prompts_s.pop(prompt_id, None)
        if asked_s is not None:
            recorder.prompt_shown(now_s - asked_s)
        if self._window:
            self._unacked.append(index)
            recorder.credit(-1, 1)

    def _acked(self, chunk: int) -> None:
        taken = 0
        while self._unacked and self._unacked[0] <= chunk:
            self._unacked.popleft()
            taken += 1
        if taken:
            self._recorder.credit(taken, -taken)

    def _enter(self, state: str | None) -> None:
        self._recorder.session_state(self._state, state)
        self._state = state

    def _over(self) -> None:
        self._is_over = True
        self._enter(None)
        if self._started_s is not None:
            self._recorder.session_lasted(self._clock() - self._started_s)
            self._recorder.credit(len(self._unacked) - self._window, -len(self._unacked))


class _Watched:
    """A client's messages, shown to somebody else first."""

    def __init__(
        self, requests: AsyncIterator[pb.StreamVideoRequest], see: Callable[[pb.StreamVideoRequest], None]
    ) -> None:
        self._requests = requests
        self._see = see

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> pb.StreamVideoRequest:
        message = await anext(self._requests)
        self._see(message)
        return message
