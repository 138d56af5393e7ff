"""The asyncio client."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import grpc

from causal_forcing.prompts import PromptUpdate
from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc

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
    StreamOptions,
    VideoServiceError,
    as_update,
    prompt_to_proto,
    seconds,
)

PING_EVERY_S = 5.0
"""How often a client shows that it is alive; servers take 30 s of silence for death, unless configured otherwise."""


class AsyncVideoClient:
    """A connection to the service.

    Args:
        address: ``host:port``.
        credentials: For TLS; None connects in clear text.
        metadata: Sent with every call, e.g. ``[("authorization", "Bearer ...")]``.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._metadata = tuple(metadata)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self._address)
        else:
            self._channel = grpc.aio.secure_channel(self._address, self._credentials)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._channel is not None:
            await self._channel.close(None)

    @asynccontextmanager
    async def stream(self, options: StreamOptions) -> AsyncIterator[AsyncVideoSession]:
        """Open a session; leaving the block ends it."""
        if self._channel is None:
            raise RuntimeError("use the client as a context manager")
        stub = video_pb2_grpc.VideoServiceStub(self._channel)  # type: ignore[no-untyped-call]
        session = AsyncVideoSession(stub.StreamVideo(metadata=self._metadata or None), options)
        try:
            yield session
        finally:
            await session.close()


class AsyncVideoSession:
    """One session: iterate over it for its events.

    Asking for the event after the last frame of a chunk acknowledges that chunk, so the server keeps pace with the loop
    that shows the frames. A task in the background sends pings.
    """

    def __init__(self, call: Any, options: StreamOptions) -> None:  # noqa: ANN401  (grpc's call is untyped)
        self._call = call
        self._options = options
        self._write_lock = asyncio.Lock()
        self._is_open = True
        self._prompt_numbers = itertools.count(1)
        self._next_sequence = 0
        self._parts: list[bytes] = []
        self._init_segment = b""
        self._to_ack: int | None = None
        self._config = pb.SessionConfig()
        self._pinging: asyncio.Task[None] | None = None
        self._error: VideoServiceError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._pinging is None:
            await self._write(pb.StreamVideoRequest(config=self._options.to_proto()))
            self._pinging = asyncio.create_task(self._ping())
        if self._to_ack is not None:
            chunk, self._to_ack = self._to_ack, None
            await self._write(pb.StreamVideoRequest(ack=pb.Ack(chunk_index=chunk)))
        while True:
            event = self._understand(await self._read())
            if event is not None:
                return event

    async def update_prompt(self, prompt: PromptUpdate | str) -> str:
        """Change the prompt; return the name that PromptApplied and frames will carry."""
        number = next(self._prompt_numbers)
        update = prompt_to_proto(as_update(prompt))
        update.prompt_id = update.prompt_id or f"prompt-{number}"
        await self._write(pb.StreamVideoRequest(prompt=update))
        return update.prompt_id

    async def pause(self) -> None:
        """Let the session rest after the chunks under way; the server ends one that rests for too long."""
        await self._write(pb.StreamVideoRequest(pause=pb.Pause()))

    async def resume(self) -> None:
        """Go on after a pause."""
        await self._write(pb.StreamVideoRequest(resume=pb.Resume()))

    async def request_keyframe(self) -> None:
        """Ask that the next chunk begin with a frame that can be decoded by itself."""
        await self._write(pb.StreamVideoRequest(request_keyframe=pb.RequestKeyframe()))

    async def end(self) -> None:
        """Ask for the end; the iteration goes on until the server's Ended."""
        await self._write(pb.StreamVideoRequest(end=pb.End()))
        self._is_open = False

    async def close(self) -> None:
        """End the session without waiting for what is under way."""
        self._is_open = False
        if self._pinging is not None:
            self._pinging.cancel()
        self._call.cancel()

    async def _write(self, message: pb.StreamVideoRequest) -> None:
        """Send a message; a call that has ended says so when it is read."""
        if not self._is_open:
            return
        async with self._write_lock:
            try:
                await self._call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                self._is_open = False

    async def _ping(self) -> None:
        for nonce in itertools.count():
            await asyncio.sleep(PING_EVERY_S)
            await self._write(pb.StreamVideoRequest(ping=pb.Ping(nonce=nonce)))

    async def _read(self) -> pb.StreamVideoResponse:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._error or VideoServiceError.from_status(error.code(), error.details() or "") from None
        if not isinstance(message, pb.StreamVideoResponse):  # grpc.aio.EOF
            code = await self._call.code()
            if code is not grpc.StatusCode.OK:
                details = await self._call.details()
                raise self._error or VideoServiceError.from_status(code, details or "")
            raise StopAsyncIteration
        if message.sequence != self._next_sequence:
            got = f"message {message.sequence} came where {self._next_sequence} was due"
            raise VideoServiceError(grpc.StatusCode.DATA_LOSS, got, reason="SEQUENCE_GAP")
        self._next_sequence += 1
        return message

    def _understand(self, message: pb.StreamVideoResponse) -> Event | None:
        """Return a message's event; None for one that is not for the user, or from a later protocol."""
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
                self._error = VideoServiceError.from_proto(message.error)
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
            self._to_ack = part.chunk_index
            spent = part.timings
            taken = (spent.denoise, spent.decode, spent.encode, spent.queue, spent.text)
            timings = ChunkTimings(*map(seconds, taken))
        return Frame(
            chunk_index=part.chunk_index,
            frame_index=part.frame_index,
            prompt_id=part.prompt_id,
            data=data,
            codec=self._options.codec,
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
