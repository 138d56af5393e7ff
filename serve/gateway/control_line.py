"""One session's messages to whichever generator runs it: said once, and said again when another one takes over.

Each lease has a log of its own in the mailbox, so that a generator that was given up and wakes again reads nothing that
is meant for its successor. What the lost one had heard and not done yet (prompts that no chunk shows) and what holds
until it is changed (credit, a pause) is put into the new log before the new lease begins.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from causal_forcing.prompts import PromptUpdate
from serve.messages import Control, Credit, EmbeddingWindow, PackedEmbedding, SetPaused, StartFrom

STANDING = (StartFrom, SetPaused, Credit)
"""Messages of which the newest holds until there is a newer one."""


class Mailbox(Protocol):
    """What a line needs of the mailbox."""

    async def open_mailbox(self, log_id: str) -> None:
        """Create a log."""
        ...

    async def put(self, log_id: str, message: Control) -> None:
        """Append to a log."""
        ...

    async def close_mailbox(self, log_id: str) -> None:
        """Forget a log."""
        ...


class ControlLine:
    """The gateway's end of a session's control messages.

    Args:
        mailbox: Where the logs are.
        session_id: The session whose messages these are.
    """

    def __init__(self, mailbox: Mailbox, session_id: str) -> None:
        self._mailbox = mailbox
        self._session_id = session_id
        self._leases = 0
        self._log_id = ""
        self._window = EmbeddingWindow()
        self._unshown: deque[tuple[PromptUpdate, list[PackedEmbedding]]] = deque()
        self._standing: dict[type[Control], Control] = {}
        self._order = asyncio.Lock()

    async def open(self) -> str:
        """Begin the log of the next lease, with everything that its generator has to know; return its name."""
        async with self._order:
            await self._close()
            self._leases += 1
            log_id = f"{self._session_id}.{self._leases}"
            await self._mailbox.open_mailbox(log_id)
            self._log_id, self._window = log_id, EmbeddingWindow()
            for kind in STANDING:
                if kind in self._standing:
                    await self._mailbox.put(log_id, self._standing[kind])
            for update, embeddings in self._unshown:
                await self._mailbox.put(log_id, self._window.compose(update, embeddings))
            return log_id

    async def put(self, message: Control) -> None:
        """Say something to the generator."""
        async with self._order:
            if isinstance(message, STANDING):
                self._standing[type(message)] = message
            await self._put(lambda: message)

    async def prompt(self, update: PromptUpdate, embeddings: list[PackedEmbedding]) -> None:
        """Hand on a prompt; embeddings that this generator has are not sent again."""
        async with self._order:
            self._unshown.append((update, embeddings))
            await self._put(lambda: self._window.compose(update, embeddings))

    def shown(self, superseded: int) -> tuple[PromptUpdate, tuple[PackedEmbedding, ...]]:
        """Note that a chunk shows the prompt after so many that it replaced; return that prompt."""
        for _ in range(superseded):
            self._unshown.popleft()
        update, embeddings = self._unshown.popleft()
        self._standing.pop(StartFrom, None)
        return update, tuple(embeddings)

    async def close(self) -> None:
        """Forget the log and all that was said; nothing is said any more."""
        async with self._order:
            self._window, self._standing = EmbeddingWindow(), {}
            self._unshown.clear()
            await self._close()

    async def _put(self, message: Callable[[], Control]) -> None:
        if self._log_id:
            await self._mailbox.put(self._log_id, message())

    async def _close(self) -> None:
        if self._log_id:
            log_id, self._log_id = self._log_id, ""
            await self._mailbox.close_mailbox(log_id)
