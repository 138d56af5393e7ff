"""One session of the asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any, Self

import grpc

from causal_forcing.prompts import PromptUpdate
from protos.causal_forcing.v1 import video_pb2 as pb

from .errors import VideoServiceError
from .events import Event, Frame, StreamOptions, as_update, prompt_to_proto
from .listener import Listener

PING_EVERY_S = 5.0
"""How often a client shows that it is alive; servers take 30 s of silence for death, unless configured otherwise."""

UNANSWERED_PINGS = 4
"""Pings in a row after which nothing has come for the service to be taken for dead; one that lives answers each."""

WRITE_FAILED = "Internal error from Core"
"""What grpc.aio calls a write to a call that has ended."""

STATUS_S = 5.0
"""How long the server's status may take to follow that."""


class AsyncVideoSession:
    """One session: iterate over it for its events.

    Asking for the event after the last frame of a chunk acknowledges that chunk, so the server keeps pace with the loop
    that shows the frames. Tasks in the background send pings and read what comes; credit bounds how much that is.
    Waiting for an event may be given up, with a timeout say: nothing is lost.
    """

    def __init__(self, call: Any, options: StreamOptions) -> None:  # noqa: ANN401  (grpc's call is untyped)
        self._call = call
        self._options = options
        self._listener = Listener(options.codec)
        self._write_lock = asyncio.Lock()
        self._is_open = True
        self._prompt_numbers = itertools.count(1)
        self._to_ack: int | None = None
        self._heard: asyncio.Queue[Event | None] = asyncio.Queue()
        self._is_over = False
        self._has_heard: bool | None = None  # since the last ping; None until the service has said anything
        self._error: VideoServiceError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._beginning: asyncio.Task[None] | None = None
        self._status_came = asyncio.Event()
        call.add_done_callback(lambda _: self._status_came.set())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        await asyncio.shield(self.begin())  # grpc.aio ends a call whose write is cancelled
        if self._to_ack is not None:
            chunk, self._to_ack = self._to_ack, None
            await asyncio.shield(self._write(pb.StreamVideoRequest(ack=pb.Ack(chunk_index=chunk))))
        event = None if self._is_over else await self._heard.get()
        if event is None:
            self._is_over = True
            raise self._error or StopAsyncIteration
        if isinstance(event, Frame) and event.last_in_chunk:
            self._to_ack = event.chunk_index
        return event

    def begin(self) -> asyncio.Task[None]:
        """Send the configuration, which comes before everything else, and begin to listen; once."""
        if self._beginning is None:
            self._beginning = asyncio.create_task(self._send_config())
        return self._beginning

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
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        beginning = [self._beginning] if self._beginning is not None else []
        await asyncio.gather(*self._tasks, *beginning, return_exceptions=True)

    async def _write(self, message: pb.StreamVideoRequest) -> None:
        """Send a message after the configuration."""
        await asyncio.shield(self.begin())
        await self._send(message)

    async def _send_config(self) -> None:
        config = self._options.to_proto()
        if self._is_open:
            self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._ping())]
            await self._send(pb.StreamVideoRequest(config=config))

    async def _send(self, message: pb.StreamVideoRequest) -> None:
        """Send a message; a call that has ended says so when it is read."""
        if not self._is_open:
            return
        async with self._write_lock:
            try:
                await self._call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                self._is_open = False

    async def _ping(self) -> None:
        """Show that this client is alive, and notice when the service is not: a lost connection may say nothing."""
        unanswered = 0
        for nonce in itertools.count():
            await asyncio.sleep(PING_EVERY_S)
            if self._has_heard is not None:  # before that, the call may wait for a gateway to start
                unanswered = 0 if self._has_heard else unanswered + 1
                self._has_heard = False
            if unanswered > UNANSWERED_PINGS:
                text = f"nothing has come from the service since {UNANSWERED_PINGS} pings"
                self._error = VideoServiceError(grpc.StatusCode.UNAVAILABLE, text, reason="SERVER_SILENT")
                self._call.cancel()
                return
            await self._write(pb.StreamVideoRequest(ping=pb.Ping(nonce=nonce)))

    async def _read(self) -> None:
        """Take what the server says, to the end: its own account of an error is the last of it."""
        try:
            async for message in self._call:
                self._has_heard = True
                event = self._listener.hear(message)
                if event is not None:
                    self._heard.put_nowait(event)
        except grpc.aio.AioRpcError as error:
            self._error = self._listener.error or await self._error_of(error)
        except VideoServiceError as error:
            self._error = error
        finally:
            self._heard.put_nowait(None)

    async def _error_of(self, error: grpc.aio.AioRpcError) -> VideoServiceError:
        """Return what the server ended the call with.

        A write that fails because the call has ended makes grpc.aio name an error of its own until the server's status
        has been taken from the connection, where it is by then.
        """
        code, details = error.code(), error.details()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATUS_S):
                while details == WRITE_FAILED:
                    self._status_came.clear()
                    await self._status_came.wait()
                    code, details = await self._call.code(), await self._call.details()
        return VideoServiceError.from_status(code, details or "")


class AsyncVideo:
    """A video of a given length: iterate over it for its events. Nothing is read before it is asked for."""

    def __init__(self, call: Any, codec: str) -> None:  # noqa: ANN401  (grpc's call is untyped)
        self._call = call
        self._answers = aiter(call)
        self._listener = Listener(codec)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            while True:
                event = self._listener.hear((await anext(self._answers)).message)
                if event is not None:
                    return event
        except grpc.aio.AioRpcError as error:
            raise self._listener.error or VideoServiceError.from_call(error) from None

    async def close(self) -> None:
        """End the video without waiting for what is under way."""
        self._call.cancel()
