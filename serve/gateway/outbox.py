"""What a client is sent, in order and numbered without gaps."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from causal_forcing.prompts import PromptUpdate
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.codecs.frames import EncodedFrame, split
from serve.config import ServiceConfig
from serve.messages import Decoded, GeneratedChunk, QueuePlace
from serve.session_request import SessionRequest
from serve.status import Failure

from .model_facts import model_info, session_limits
from .requests import duration_ns, effective_config

MAX_PART_BYTES = (1 << 20) - 4096
"""Frame data in one message, so that the whole message stays within 1 MiB, an init segment included."""


@dataclass(frozen=True)
class ChunkCosts:
    """Where the time of one chunk went, in seconds (see the protocol's ChunkTimings)."""

    denoise_s: float
    decode_s: float
    encode_s: float
    queue_s: float
    text_s: float

    @classmethod
    def of(cls, chunk: GeneratedChunk, decoded: Decoded, text_s: float, elapsed_s: float) -> ChunkCosts:
        """Return the costs of a chunk that was in the gateway for ``elapsed_s``."""
        queue_s = elapsed_s - decoded.decode_s - decoded.encode_s
        return cls(chunk.denoise_s, decoded.decode_s, decoded.encode_s, queue_s, text_s)

    def write(self, timings: pb.ChunkTimings) -> None:
        """Fill in the protocol's message."""
        for name in ("denoise", "decode", "encode", "queue", "text"):
            getattr(timings, name).FromNanoseconds(duration_ns(getattr(self, f"{name}_s")))


class Outbox:
    """Messages on their way to the client; iterate over it until it is closed.

    It needs no bound of its own: frames are limited by the session's credit (or by the length of a video for a client
    that only reads), and everything else answers something that the client has sent, which is limited, too.

    Attributes:
        sent: Messages so far; the next one's sequence number.
        next_frame: Index of the next pixel frame; frames sent and dropped so far.
        byte_count: Bytes of frames so far.
        nbytes: Bytes of frames that have not been taken yet.
        chunk_count: Chunks so far.
        dropped_frame_count: Pixel frames left out so far.
    """

    def __init__(self) -> None:
        self.sent = self.next_frame = self.byte_count = self.nbytes = 0
        self.chunk_count = self.dropped_frame_count = 0
        self._dropping: pb.FramesDropped | None = None
        self._is_over = False
        self._queue: asyncio.Queue[pb.StreamVideoResponse | None] = asyncio.Queue()

    def __aiter__(self) -> Outbox:
        return self

    async def __anext__(self) -> pb.StreamVideoResponse:
        message = await self._queue.get()
        if message is None:
            raise StopAsyncIteration
        self.nbytes -= len(message.frame.data)
        return message

    @property
    def frame_count(self) -> int:
        """Pixel frames so far."""
        return self.next_frame - self.dropped_frame_count

    def close(self) -> None:
        """End the iteration after what was sent."""
        self._queue.put_nowait(None)

    def discard(self) -> None:
        """Let go of what nobody will take any more."""
        self._queue, self.nbytes = asyncio.Queue(), 0

    def place(self, place: QueuePlace, waited_s: float) -> None:
        """Tell where the session stands in the queue."""
        status = pb.QueueStatus(sessions_ahead_count=place.ahead)
        status.waited.FromNanoseconds(duration_ns(waited_s))
        if place.estimated_wait_s is not None and not place.replica_id:
            status.estimated_wait.FromNanoseconds(duration_ns(place.estimated_wait_s))
        self._send(queue_status=status)

    def started(self, session_id: str, request: SessionRequest, service: ServiceConfig) -> None:
        """Tell that the session has a generator."""
        started = pb.SessionStarted(
            session_id=session_id,
            effective_config=effective_config(request),
            model=model_info(service),
            limits=session_limits(service),
        )
        self._send(session_started=started)

    def moved(self, next_chunk: int, reason: str, interruption_s: float) -> None:
        """Tell that the session goes on with another generator."""
        moved = pb.SessionMoved(chunk_index=next_chunk, frame_index=self.next_frame, reason=reason)
        moved.interruption.FromNanoseconds(duration_ns(interruption_s))
        self._send(session_moved=moved)

    def prompt_refused(self, update: PromptUpdate, failure: Failure) -> None:
        """Tell that a prompt has no effect."""
        refused = pb.PromptRefused(
            prompt_id=update.prompt_id, reason=failure.reason, message=failure.message, error_id=failure.error_id
        )
        if failure.retry_after_s is not None:
            refused.retry_after.FromNanoseconds(duration_ns(failure.retry_after_s))
        self._send(prompt_refused=refused)

    def pong(self, ping: pb.Ping) -> None:
        """Answer a ping."""
        self._send(pong=pb.Pong(nonce=ping.nonce))

    def ending(self, remaining_s: float) -> None:
        """Warn that the session will reach its longest length."""
        warning = pb.SessionEnding()
        warning.remaining.FromNanoseconds(duration_ns(remaining_s))
        self._send(session_ending=warning)

    def chunk(self, chunk: GeneratedChunk, decoded: Decoded, costs: ChunkCosts) -> None:
        """Send a chunk: what was dropped before it, where its prompt takes effect, if it does, and its frames."""
        self._flush_dropped()
        self._applied(chunk)
        frames = decoded.frames or ()
        for number, frame in enumerate(frames):
            self._frame(frame, chunk, costs if number == len(frames) - 1 else None)
        self.chunk_count += 1

    def drop(self, chunk: GeneratedChunk) -> None:
        """Leave a chunk out: the frames are told of before the next ones that are sent, its prompt at once."""
        self._applied(chunk)
        if self._dropping is None:
            self._dropping = pb.FramesDropped(first_frame_index=self.next_frame, first_chunk_index=chunk.index)
        self._dropping.frame_count += chunk.frame_count
        self._dropping.chunk_count += 1
        self.dropped_frame_count += chunk.frame_count
        self.next_frame += chunk.frame_count

    def ended(self, reason: pb.EndReason, duration_s: float) -> None:
        """Tell that the session ended well, and what was sent."""
        self._flush_dropped()
        ended = pb.SessionEnded(
            reason=reason,
            chunk_count=self.chunk_count,
            frame_count=self.frame_count,
            byte_count=self.byte_count,
            dropped_frame_count=self.dropped_frame_count,
        )
        ended.duration.FromNanoseconds(duration_ns(duration_s))
        self._send(session_ended=ended)
        self._is_over = True

    def failed(self, failure: Failure) -> None:
        """Tell that the session failed."""
        self._send(error=failure.to_proto())
        self._is_over = True

    def _applied(self, chunk: GeneratedChunk) -> None:
        if not chunk.prompt_applied:
            return
        applied = pb.PromptApplied(
            prompt_id=chunk.prompt_id,
            chunk_index=chunk.index,
            frame_index=self.next_frame,
            superseded_prompt_ids=chunk.superseded,
        )
        self._send(prompt_applied=applied)

    def _flush_dropped(self) -> None:
        if self._dropping is not None:
            dropped, self._dropping = self._dropping, None
            self._send(frames_dropped=dropped)

    def _frame(self, encoded: EncodedFrame, chunk: GeneratedChunk, costs: ChunkCosts | None) -> None:
        """Send one frame in parts; ``costs`` are given for the last one of its chunk."""
        parts = split(encoded.data, MAX_PART_BYTES)
        for index, part in enumerate(parts):
            frame = pb.VideoFrame(
                chunk_index=chunk.index,
                frame_index=self.next_frame,
                prompt_id=chunk.prompt_id,
                data=part,
                part_index=index,
                part_count=len(parts),
                last_in_chunk=costs is not None and index == len(parts) - 1,
                keyframe=encoded.keyframe,
                init_segment=encoded.init_segment if index == 0 else b"",
            )
            if frame.last_in_chunk and costs is not None:
                costs.write(frame.timings)
            self._send(frame=frame)
        self.next_frame += 1
        self.byte_count += len(encoded.data)

    def _send(self, **message: Any) -> None:  # noqa: ANN401  (one of the protocol's messages)
        if self._is_over:
            return  # a chunk that was under way when the last message was said
        self._queue.put_nowait(pb.StreamVideoResponse(sequence=self.sent, **message))
        self.nbytes += len(frame.data) if (frame := message.get("frame")) is not None else 0
        self.sent += 1
