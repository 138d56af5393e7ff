"""The client for programs without asyncio: the asyncio client on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from causal_forcing.prompts import PromptUpdate

from .aio import AsyncVideoClient, AsyncVideoSession
from .events import Event, StreamOptions

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

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


class VideoSession:
    """One session: iterate over it for its events."""

    def __init__(self, session: AsyncVideoSession, client: VideoClient) -> None:
        self._session = session
        self._client = client

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = self._client._wait(self._next())
        if event is None:
            raise StopIteration
        return event

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

    async def _next(self) -> Event | None:
        return await anext(self._session, None)
