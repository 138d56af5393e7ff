"""One session's prompts on their way to the generator: encoded at once, handed on in order, counted until they show."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NoReturn

from causal_forcing.errors import CausalForcingError, NoCapacity
from causal_forcing.prompts import PromptUpdate
from serve.access.usage import Spent
from serve.messages import PackedEmbedding
from serve.status import Failure, failure_of

from .backends import Backends
from .control_line import ControlLine

_Encoded = tuple[list[PackedEmbedding], float]
"""A prompt's embeddings, and the seconds they took."""

Refuse = Callable[[PromptUpdate, Failure], None]
"""Tells the client that a prompt has no effect, and why."""


class PromptFeed:
    """Turns prompts into embeddings and hands them to the generator.

    Args:
        backends: The other processes.
        line: Where encoded prompts go.
        limit: Prompts that may wait for their first chunk.
        check: Raises if a prompt may not be shown; the session goes on without it.
        refuse: Is told of such prompts.
        spent: What the session has taken so far.
    """

    def __init__(
        self,
        backends: Backends,
        line: ControlLine,
        limit: int,
        *,
        check: Callable[[PromptUpdate], Awaitable[None]],
        refuse: Refuse,
        spent: Spent,
    ) -> None:
        self._backends = backends
        self._line = line
        self._check = check
        self._refuse = refuse
        self._spent = spent
        self._limit = limit
        self._queue: asyncio.Queue[tuple[PromptUpdate, asyncio.Task[_Encoded | Failure]]] = asyncio.Queue()
        self._unapplied = 0
        self._text_s: deque[float] = deque()

    def submit(self, update: PromptUpdate, *, is_checked: bool = False) -> None:
        """Begin to encode a prompt; it goes to the generator after those before it. Too many waiting: refuse it.

        Args:
            update: The prompt.
            is_checked: Whether it is known that it may be shown.
        """
        if self._unapplied >= self._limit:
            text = f"{self._limit} prompts wait for their first chunk"
            self._refuse(update, failure_of(NoCapacity(text, reason="TOO_MANY_PROMPTS")))
            return
        self._unapplied += 1
        self._queue.put_nowait((update, asyncio.create_task(self._encode(update, is_checked=is_checked))))

    async def run(self) -> NoReturn:
        """Hand on prompts in order, for ever."""
        while True:
            update, encoding = await self._queue.get()
            encoded = await encoding
            if isinstance(encoded, Failure):
                self._unapplied -= 1
                self._refuse(update, encoded)
                continue
            embeddings, text_s = encoded
            self._text_s.append(text_s)
            self._spent.prompt(text_s)
            await self._line.prompt(update, embeddings)

    def applied(self, superseded: int) -> float:
        """Note that a prompt shows, and that it replaced others; return the seconds its encoding took."""
        count = 1 + superseded
        self._unapplied -= count
        return [self._text_s.popleft() for _ in range(count)][-1]

    async def close(self) -> None:
        """Give up what waits."""
        waiting = [self._queue.get_nowait()[1] for _ in range(self._queue.qsize())]
        for encoding in waiting:
            encoding.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _encode(self, update: PromptUpdate, *, is_checked: bool) -> _Encoded | Failure:
        """Return a prompt's embeddings, or why it may not be shown; raise if the text encoder fails."""
        if not is_checked:
            try:
                await self._check(update)
            except CausalForcingError as error:
                return failure_of(error)
        start = time.perf_counter()
        embeddings = await asyncio.gather(*(self._backends.encode(prompt.text) for prompt in update.prompts))
        return list(embeddings), time.perf_counter() - start
