"""From the server's messages to events."""

from __future__ import annotations

import grpc

from protos.causal_forcing.v1 import video_pb2 as pb

from .errors import VideoServiceError
from .events import (
    ChunkTimings,
    Ended,
    Ending,
    Event,
    Frame,
    FramesDropped,
    Moved,
    PromptApplied,
    PromptRefused,
    Queued,
    Started,
    seconds,
)


class Listener:
    """Understands one session's messages, in order.

    Args:
        codec: Name of the codec that was asked for.

    Attributes:
        error: What the server says went wrong, if it has.
    """

    def __init__(self, codec: str) -> None:
        self.error: VideoServiceError | None = None
        self._codec = codec
        self._next_sequence = 0
        self._parts: list[bytes] = []
        self._init_segment = b""
        self._config = pb.SessionConfig()

    def hear(self, message: pb.StreamVideoResponse) -> Event | None:
        """Return a message's event; None for one that is not for the user, or from a later protocol.

        Raises:
            VideoServiceError: If a message before this one is missing.
        """
        if message.sequence != self._next_sequence:
            got = f"message {message.sequence} came where {self._next_sequence} was due"
            raise VideoServiceError(grpc.StatusCode.DATA_LOSS, got, reason="SEQUENCE_GAP")
        self._next_sequence += 1
        match message.WhichOneof("message"):
            case "frame":
                return self._frame(message.frame)
            case "queue_status":
                status = message.queue_status
                estimate = seconds(status.estimated_wait) if status.HasField("estimated_wait") else None
                return Queued(status.sessions_ahead_count, seconds(status.waited), estimate)
            case "session_started":
                started = message.session_started
                self._config = started.effective_config
                return Started(started.session_id, started.effective_config, started.model, started.limits)
            case "prompt_applied":
                applied = message.prompt_applied
                superseded = tuple(applied.superseded_prompt_ids)
                return PromptApplied(applied.prompt_id, applied.chunk_index, applied.frame_index, superseded)
            case "session_moved":
                moved = message.session_moved
                return Moved(moved.chunk_index, moved.frame_index, moved.reason, seconds(moved.interruption))
            case "prompt_refused" | "frames_dropped" | "session_ending":
                return _warning(message)
            case "session_ended":
                ended = message.session_ended
                reason = pb.EndReason.Name(ended.reason).removeprefix("END_REASON_")
                counts = (ended.chunk_count, ended.frame_count, ended.byte_count)
                return Ended(reason, *counts, seconds(ended.duration))
            case "error":
                self.error = VideoServiceError.from_proto(message.error)
        return None

    def _frame(self, part: pb.VideoFrame) -> Frame | None:
        """Return a frame when its last part has come."""
        self._parts.append(part.data)
        if part.part_index == 0:
            self._init_segment = part.init_segment
        if part.part_index < part.part_count - 1:
            return None
        data, self._parts = b"".join(self._parts), []
        timings = None
        if part.last_in_chunk:
            spent = part.timings
            taken = (spent.denoise, spent.decode, spent.encode, spent.queue, spent.text)
            timings = ChunkTimings(*map(seconds, taken))
        return Frame(
            chunk_index=part.chunk_index,
            frame_index=part.frame_index,
            prompt_id=part.prompt_id,
            data=data,
            codec=self._codec,
            height=self._config.height,
            width=self._config.width,
            timings=timings,
            keyframe=part.keyframe,
            init_segment=self._init_segment,
        )


def _warning(message: pb.StreamVideoResponse) -> PromptRefused | FramesDropped | Ending:
    if message.HasField("prompt_refused"):
        refused = message.prompt_refused
        retry_after_s = seconds(refused.retry_after) if refused.HasField("retry_after") else None
        return PromptRefused(refused.prompt_id, refused.reason, refused.message, retry_after_s, refused.error_id)
    if message.HasField("session_ending"):
        return Ending(seconds(message.session_ending.remaining))
    dropped = message.frames_dropped
    frames = (dropped.first_frame_index, dropped.frame_count)
    return FramesDropped(*frames, dropped.first_chunk_index, dropped.chunk_count)
