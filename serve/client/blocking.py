"""The client for programs without asyncio: the asyncio client on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from causal_forcing.prompts import PromptUpdate
from protos.causal_forcing.v1 import video_pb2 as pb

from .aio import AsyncVideoClient
from .events import Event, SessionInfo, StreamOptions
from .reconnect import AsyncReconnectingSession, Retry
from .session import AsyncVideoSession

T = TypeVar("T")


class VideoClient:
    """A connection to the service; arguments as for :class:`~serve.client.aio.AsyncVideoClient`."""

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._client = AsyncVideoClient(address, credentials=credentials, metadata=metadata)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="video-client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait(self._client.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait(self._client.__aexit__(kind, error, trace))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @contextmanager
    def stream(self, options: StreamOptions) -> Iterator[VideoSession]:
        """Open a session; leaving the block ends it."""
        context = self._client.stream(options)
        session = self._wait(context.__aenter__())
        try:
            yield VideoSession(session, self)
        finally:
            self._wait(context.__aexit__(None, None, None))

    @contextmanager
    def keep_streaming(self, options: StreamOptions, retry: Retry | None = None) -> Iterator[VideoSession]:
        """Open a session that is followed by a new one whenever it is lost; leaving the block ends it."""
        context = self._client.keep_streaming(options, retry)
        session = self._wait(context.__aenter__())
        try:
            yield VideoSession(session, self)
        finally:
            self._wait(context.__aexit__(None, None, None))

    @contextmanager
    def generate(self, options: StreamOptions, duration_s: float) -> Iterator[Video]:
        """Ask for a video of a given length, at its own pace and without acks; leaving the block ends it."""
        context = self._client.generate(options, duration_s)
        video = self._wait(context.__aenter__())
        try:
            yield Video(video, self)
        finally:
            self._wait(context.__aexit__(None, None, None))

    def get_model(self) -> pb.GetModelResponse:
        """Return which model runs and what sessions may ask for."""
        return self._wait(self._client.get_model())

    def get_session(self, session_id: str) -> SessionInfo:
        """Return where one of the caller's sessions stands (any session, for an operator)."""
        return self._wait(self._client.get_session(session_id))

    def list_sessions(self) -> list[SessionInfo]:
        """Return all sessions of the service; for operators."""
        return self._wait(self._client.list_sessions())

    def end_session(self, session_id: str) -> None:
        """Have a session ended; for operators."""
        self._wait(self._client.end_session(session_id))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


class Video:
    """A video of a given length: iterate over it for its events."""

    def __init__(self, events: AsyncIterator[Event], client: VideoClient) -> None:
        self._events = events
        self._client = client

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = self._client._wait(self._next())
        if event is None:
            raise StopIteration
        return event

    async def _next(self) -> Event | None:
        return await anext(self._events, None)


class VideoSession(Video):
    """One session: iterate over it for its events."""

    def __init__(self, session: AsyncVideoSession | AsyncReconnectingSession, client: VideoClient) -> None:
        super().__init__(session, client)
        self._session = session

    def update_prompt(self, prompt: PromptUpdate | str) -> str:
        """Change the prompt; return the name that PromptApplied and frames will carry."""
        return self._client._wait(self._session.update_prompt(prompt))

    def pause(self) -> None:
        """Let the session rest after the chunks under way; the server ends one that rests for too long."""
        self._client._wait(self._session.pause())

    def resume(self) -> None:
        """Go on after a pause."""
        self._client._wait(self._session.resume())

    def request_keyframe(self) -> None:
        """Ask that the next chunk begin with a frame that can be decoded by itself."""
        self._client._wait(self._session.request_keyframe())

    def end(self) -> None:
        """Ask for the end; the iteration goes on until the server's Ended."""
        self._client._wait(self._session.end())
