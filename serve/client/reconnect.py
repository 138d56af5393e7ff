"""Sessions that are followed by new ones when they are lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from causal_forcing.prompts import PromptUpdate, SwitchPolicy

from .errors import VideoServiceError
from .events import Event, Frame, PromptApplied, PromptRefused, Reconnecting, StreamOptions, as_update
from .session import AsyncVideoSession


@dataclass(frozen=True)
class Retry:
    """When a lost session is followed by a new one.

    Only errors that may pass are (:attr:`~serve.client.errors.VideoServiceError.is_retryable`: UNAVAILABLE,
    RESOURCE_EXHAUSTED, and ABORTED unless an operator ended the session). The wait doubles from try to try, and is
    never shorter than what the server asked for.

    Attributes:
        max_attempts: New sessions in a row of which none brought a frame.
        first_wait_s: Wait before the first of them.
        max_wait_s: Longest wait, unless the server asks for a longer one.
        jitter: Share of the wait that is added at random at most, so that a service that comes back does not meet all
            its clients at once.
    """

    max_attempts: int = 8
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    jitter: float = 0.25

    def wait_s(self, error: VideoServiceError, attempt: int) -> float | None:
        """Return the wait before a new session; None if there should be none.

        Args:
            error: How the session was lost.
            attempt: Which new session in a row it would be, from 1.
        """
        if not error.is_retryable or attempt > self.max_attempts:
            return None
        own_s = min(self.max_wait_s, self.first_wait_s * 2.0 ** (attempt - 1))
        return max(own_s, error.retry_after_s or 0.0) * (1 + self.jitter * random.random())


class AsyncReconnectingSession:
    """Iterates over the events of one session after another; a lost one is told as :class:`Reconnecting`.

    A new session is a new video: its indices begin at 0, and it begins with the prompt that was sent last and not
    refused. It does not go on where the lost one stopped. Waiting for an event may be given up, as with one session.

    Args:
        open_session: Opens a session; nothing is sent until it is iterated over.
        options: Of the first session.
        retry: When there is another one.
    """

    def __init__(
        self, open_session: Callable[[StreamOptions], AsyncVideoSession], options: StreamOptions, retry: Retry
    ) -> None:
        self._open_session = open_session
        self._options = options
        self._prompts = [as_update(options.prompt)]
        self._retry = retry
        self._numbers = itertools.count(1)
        self._attempt = 0
        self._due_s = 0.0
        self._is_ending = asyncio.Event()
        self._session: AsyncVideoSession | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._session is None:
            if await self._ends_first():
                raise StopAsyncIteration
            self._session = self._open_session(replace(self._options, prompt=self._prompts[-1]))
        try:
            event = await anext(self._session)
        except VideoServiceError as error:
            wait_s = self._retry.wait_s(error, self._attempt + 1)
            if wait_s is None:
                raise
            self._attempt, self._due_s = self._attempt + 1, asyncio.get_running_loop().time() + wait_s
            await self.close()
            if self._is_ending.is_set():
                raise StopAsyncIteration from error
            return Reconnecting(error, self._attempt, wait_s)
        match event:
            case Frame():
                self._attempt = 0
            case PromptApplied():
                names = [prompt.prompt_id for prompt in self._prompts]
                if event.prompt_id in names:
                    self._prompts = self._prompts[names.index(event.prompt_id) :]
            case PromptRefused():
                self._prompts = [p for p in self._prompts if p.prompt_id != event.prompt_id] or self._prompts
        return event

    async def update_prompt(self, prompt: PromptUpdate | str) -> str:
        """Change the prompt of this session and of those that follow it; return the name that frames will carry."""
        update = as_update(prompt)
        update = replace(update, prompt_id=update.prompt_id or f"prompt-{next(self._numbers)}")
        first = replace(update, transition_chunks=0, policy=SwitchPolicy.CROSS_ATTENTION)  # a first prompt has no past
        self._prompts.append(first)
        if self._session is not None:
            await self._session.update_prompt(update)
        return update.prompt_id

    async def pause(self) -> None:
        """Let the session rest; without effect between two sessions."""
        if self._session is not None:
            await self._session.pause()

    async def resume(self) -> None:
        """Go on after a pause; without effect between two sessions."""
        if self._session is not None:
            await self._session.resume()

    async def request_keyframe(self) -> None:
        """Ask for a keyframe; without effect between two sessions, because each begins with one."""
        if self._session is not None:
            await self._session.request_keyframe()

    async def end(self) -> None:
        """Ask for the end: the iteration goes on until the server's Ended; between two sessions it is over."""
        self._is_ending.set()
        if self._session is not None:
            await self._session.end()

    async def _ends_first(self) -> bool:
        """Wait until a new session is due; return at once whether there shall be none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._due_s):
                await self._is_ending.wait()
        return self._is_ending.is_set()

    async def close(self) -> None:
        """End the session that runs, if one does, without waiting for what is under way."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
