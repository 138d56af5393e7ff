"""One session's prompts on their way to the generator: encoded at once, handed on in order, counted until they show."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NoReturn

from causal_forcing.errors import NoCapacity
from causal_forcing.prompts import PromptUpdate

from .backends import Backends
from .control_line import ControlLine
from .messages import PackedEmbedding
from .usage import Spent

_Encoded = tuple[list[PackedEmbedding], float]
"""A prompt's embeddings, and the seconds they took."""


class PromptFeed:
    """Turns prompts into embeddings and hands them to the generator.

    Args:
        backends: The other processes.
        line: Where encoded prompts go.
        limit: Prompts that may wait for their first chunk.
        check: Raises if a prompt may not be shown.
        spent: What the session has taken so far.
    """

    def __init__(
        self,
        backends: Backends,
        line: ControlLine,
        limit: int,
        check: Callable[[PromptUpdate], Awaitable[None]],
        spent: Spent,
    ) -> None:
        self._backends = backends
        self._line = line
        self._check = check
        self._spent = spent
        self._limit = limit
        self._queue: asyncio.Queue[tuple[PromptUpdate, asyncio.Task[_Encoded]]] = asyncio.Queue()
        self._unapplied = 0
        self._text_s: deque[float] = deque()

    def submit(self, update: PromptUpdate, *, is_checked: bool = False) -> None:
        """Begin to encode a prompt; it goes to the generator after those before it.

        Args:
            update: The prompt.
            is_checked: Whether it is known that it may be shown.

        Raises:
            NoCapacity: If too many wait for their first chunk.
        """
        if self._unapplied >= self._limit:
            raise NoCapacity(f"{self._limit} prompts wait for their first chunk", reason="TOO_MANY_PROMPTS")
        self._unapplied += 1
        self._queue.put_nowait((update, asyncio.create_task(self._encode(update, is_checked=is_checked))))

    async def run(self) -> NoReturn:
        """Hand on prompts in order, for ever."""
        while True:
            update, encoding = await self._queue.get()
            embeddings, text_s = await encoding
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

    async def _encode(self, update: PromptUpdate, *, is_checked: bool) -> _Encoded:
        if not is_checked:
            await self._check(update)
        start = time.perf_counter()
        embeddings = await asyncio.gather(*(self._backends.encode(prompt.text) for prompt in update.prompts))
        return list(embeddings), time.perf_counter() - start
