"""What a client is sent, in order and numbered without gaps."""

from __future__ import annotations

import asyncio
from typing import Any

from protos.causal_forcing.v1 import video_pb2 as pb

from .config import ServiceConfig
from .frames import split
from .messages import Decoded, GeneratedChunk, Place
from .requests import SessionRequest, duration_ns, effective_config, model_info, session_limits
from .status import Failure

MAX_PART_BYTES = (1 << 20) - 1024
"""Frame data in one message, so that the whole message stays within 1 MiB."""


class Outbox:
    """Messages on their way to the client; iterate over it until it is closed.

    It needs no bound of its own: frames are limited by the session's credit, and everything else answers something that
    the client has sent, which is limited, too.

    Attributes:
        sent: Messages so far; the next one's sequence number.
    """

    def __init__(self) -> None:
        self.sent = 0
        self._chunks = self._frames = self._bytes = 0
        self._queue: asyncio.Queue[pb.StreamVideoResponse | None] = asyncio.Queue()

    def __aiter__(self) -> Outbox:
        return self

    async def __anext__(self) -> pb.StreamVideoResponse:
        message = await self._queue.get()
        if message is None:
            raise StopAsyncIteration
        return message

    def close(self) -> None:
        """End the iteration after what was sent."""
        self._queue.put_nowait(None)

    def place(self, place: Place, waited_s: float) -> None:
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

    def pong(self, ping: pb.Ping) -> None:
        """Answer a ping."""
        self._send(pong=pb.Pong(nonce=ping.nonce))

    def chunk(self, chunk: GeneratedChunk, decoded: Decoded) -> None:
        """Send a chunk: where its prompt takes effect, if it does, and its frames."""
        if chunk.prompt_applied:
            applied = pb.PromptApplied(
                prompt_id=chunk.prompt_id,
                chunk_index=chunk.index,
                frame_index=self._frames,
                superseded_prompt_ids=chunk.superseded,
            )
            self._send(prompt_applied=applied)
        frames = decoded.frames or ()
        for number, data in enumerate(frames):
            self._frame(data, chunk, decoded if number == len(frames) - 1 else None)
        self._chunks += 1

    def ended(self, reason: pb.EndReason, duration_s: float) -> None:
        """Tell that the session ended well, and what was sent."""
        ended = pb.SessionEnded(
            reason=reason, chunk_count=self._chunks, frame_count=self._frames, byte_count=self._bytes
        )
        ended.duration.FromNanoseconds(duration_ns(duration_s))
        self._send(session_ended=ended)

    def failed(self, failure: Failure) -> None:
        """Tell that the session failed."""
        self._send(error=failure.to_proto())

    def _frame(self, data: bytes, chunk: GeneratedChunk, last: Decoded | None) -> None:
        """Send one frame in parts; ``last`` is given for the last one of its chunk."""
        parts = split(data, MAX_PART_BYTES)
        for index, part in enumerate(parts):
            frame = pb.VideoFrame(
                chunk_index=chunk.index,
                frame_index=self._frames,
                prompt_id=chunk.prompt_id,
                data=part,
                part_index=index,
                part_count=len(parts),
            )
            if last is not None and index == len(parts) - 1:
                frame.last_in_chunk = True
                frame.timings.denoise.FromNanoseconds(duration_ns(chunk.denoise_s))
                frame.timings.decode.FromNanoseconds(duration_ns(last.decode_s))
                frame.timings.encode.FromNanoseconds(duration_ns(last.encode_s))
            self._send(frame=frame)
        self._frames += 1
        self._bytes += len(data)

    def _send(self, **message: Any) -> None:  # noqa: ANN401  (one of the protocol's messages)
        self._queue.put_nowait(pb.StreamVideoResponse(sequence=self.sent, **message))
        self.sent += 1
