"""When a session outlives its generator, and when not: one that breaks generators must not break them all."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from serve.config import Limits
from serve.errors import Unavailable
from serve.messages import GeneratedChunk, LeaseEnded, LeaseEvent
from serve.status import DEVICE_FAULT, FailedElsewhere, Failure, failure_of

PROGRESS_CHUNKS = 16
"""A session that has made this many chunks since its last move is not what breaks its generators."""


class GeneratorLost(Exception):
    """Raised when a lease ends because its generator died, failed, or was ended.

    Attributes:
        failure: What the client is told if the session ends with it.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.details)
        self.failure = failure


class Moves:
    """One session's changes of generators.

    Args:
        limits: How long one may take, and how many there may be.

    Attributes:
        wait_s: How long a session waits for its next generator; None while it has none to replace.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._chunk = 0
        self._in_a_row = self._faults = 0
        self._since_s = 0.0
        self._lost: GeneratorLost | None = None

    @property
    def wait_s(self) -> float | None:
        """How long to wait for a generator: without limit for the first one."""
        return None if self._lost is None else self._limits.move_timeout_s

    def begin(self, lost: GeneratorLost, next_chunk: int) -> None:
        """Decide that the session goes on elsewhere.

        Args:
            lost: Why it has to.
            next_chunk: Where it stands.

        Raises:
            FailedElsewhere: If it ends instead: moves are off, or it has lost too many generators in a row. The second
                device fault in a row is one too many, for then the session is the likely cause.
        """
        if next_chunk - self._chunk >= PROGRESS_CHUNKS:
            self._in_a_row = self._faults = 0
        self._chunk = next_chunk
        self._in_a_row += 1
        self._faults += lost.failure.reason == DEVICE_FAULT
        if self._in_a_row > self._limits.max_moves_in_a_row or self._faults > 1:
            raise FailedElsewhere(lost.failure)
        self._lost, self._since_s = lost, time.monotonic()

    def end(self) -> tuple[str, float] | None:
        """Return why the session has moved and how long that took; None if this is its first generator."""
        if self._lost is None:
            return None
        reason, self._lost = self._lost.failure.reason, None
        return reason, time.monotonic() - self._since_s

    def give_up(self) -> Unavailable:
        """Return what a session ends with that got no other generator."""
        assert self._lost is not None
        failure = self._lost.failure
        waited = f"{failure.message}, and there was no other one within {self._limits.move_timeout_s:g} s"
        return Unavailable(waited, reason=failure.reason)


async def chunks_of(lease: AsyncGenerator[LeaseEvent]) -> AsyncGenerator[GeneratedChunk]:
    """Yield a lease's chunks until it ends as asked.

    Raises:
        GeneratorLost: If its generator died, or its device failed.
        FailedElsewhere: If it ended with any other failure.
    """
    try:
        async for event in lease:
            match event:
                case GeneratedChunk():
                    yield event
                case LeaseEnded(None):
                    return
                case LeaseEnded(failure) if failure is not None:
                    raise GeneratorLost(failure) if failure.reason == DEVICE_FAULT else FailedElsewhere(failure)
    except Unavailable as error:
        raise GeneratorLost(failure_of(error)) from error
    raise GeneratorLost(failure_of(Unavailable("the generator ended without a word")))
