"""Control messages on their way to a running generator: a log per lease, not a queue.

The gateway owns one mailbox actor and appends; the generator polls for everything after the last entry it has seen,
which acknowledges that entry. What a generator that dies had not done yet, the gateway says again in the log of the
next lease (:class:`~serve.gateway.control_line.ControlLine`). When the gateway dies the mailbox goes with it, so that
every generator waiting on it learns that within milliseconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from causal_forcing.errors import NoCapacity, SessionStateError

from .messages import Control, Credit, SetPaused

MAX_ENTRIES = 4096
"""Unread entries of one log: more than the gateway ever writes. It lets at most 1024 prompts wait
(``limits.max_pending_prompts``), and between two of them is one of every other kind."""

LATEST_ONLY = (Credit, SetPaused)
"""Messages of which a newer one replaces an unread older one, back to the last prompt."""

SPARE_CALLS = 100
"""Calls that may run beside the waiting polls, so that a write never waits for a poll to end."""


@dataclass
class MailboxLog:
    """The messages of one lease that its generator has not acknowledged.

    Attributes:
        next_seq: Sequence number of the next message; the first is 1.
        readers: Polls that wait.
        read_s: When the log was opened or the last poll ended, on the monotonic clock.
    """

    next_seq: int = 1
    readers: int = 0
    read_s: float = 0.0
    _entries: deque[tuple[int, Control]] = field(default_factory=deque)

    def append(self, message: Control) -> int:
        """Add a message and return its sequence number; a credit replaces an unread credit, a pause an unread pause.

        Raises:
            NoCapacity: If the generator has not read for too long.
        """
        if isinstance(message, LATEST_ONLY):
            self._drop_older(type(message))
        if len(self._entries) >= MAX_ENTRIES:
            raise NoCapacity("the generator does not read its messages", reason="MAILBOX_FULL")
        seq = self.next_seq
        self._entries.append((seq, message))
        self.next_seq += 1
        return seq

    def _drop_older(self, kind: type[Control]) -> None:
        for index in reversed(range(len(self._entries))):
            unread = self._entries[index][1]
            if isinstance(unread, kind):
                del self._entries[index]
            if not isinstance(unread, LATEST_ONLY):
                return

    def after(self, seq: int) -> list[tuple[int, Control]]:
        """Forget messages up to ``seq`` and return the rest in order.

        Raises:
            SessionStateError: If ``seq`` was never given out: this log is not the one that was read before.
        """
        if seq >= self.next_seq:
            raise SessionStateError("the mailbox was lost", reason="MAILBOX_LOST")
        while self._entries and self._entries[0][0] <= seq:
            self._entries.popleft()
        return list(self._entries)


class MailboxRoom:
    """The logs of one gateway's leases, with readers that wait."""

    def __init__(self) -> None:
        self._logs: dict[str, MailboxLog] = {}
        self._news: dict[str, asyncio.Event] = {}

    def open(self, log_id: str) -> None:
        """Create a log."""
        self._logs[log_id] = MailboxLog(read_s=time.monotonic())
        self._news[log_id] = asyncio.Event()

    def put(self, log_id: str, message: Control) -> int:
        """Append a message and wake the reader.

        Raises:
            SessionStateError: If there is no such log (its lease is over, or the mailbox was lost).
        """
        seq = self._log(log_id).append(message)
        self._news[log_id].set()
        return seq

    async def poll(self, log_id: str, after_seq: int, timeout_s: float) -> list[tuple[int, Control]]:
        """Return all messages after ``after_seq``, waiting for one at most ``timeout_s``; acknowledges the others.

        Raises:
            SessionStateError: If there is no such log (its lease is over, or the mailbox was lost).
        """
        log = self._log(log_id)
        news = self._news[log_id]
        log.readers += 1
        try:
            async with asyncio.timeout(timeout_s):
                while not (entries := log.after(after_seq)):
                    news.clear()
                    await news.wait()
                    self._log(log_id)
        except TimeoutError:
            return []
        finally:
            log.readers -= 1
            log.read_s = time.monotonic()
        return entries

    def close(self, log_id: str) -> None:
        """Forget a log; its reader, if one waits, gets an error."""
        self._logs.pop(log_id, None)
        news = self._news.pop(log_id, None)
        if news is not None:
            news.set()

    def unread(self, for_s: float) -> list[str]:
        """Return the logs that nobody has read, or waited at, for that long: their reader is frozen."""
        limit_s = time.monotonic() - for_s
        return [log_id for log_id, log in self._logs.items() if not log.readers and log.read_s < limit_s]

    def count(self) -> int:
        """Return the number of open logs."""
        return len(self._logs)

    def _log(self, log_id: str) -> MailboxLog:
        if log_id not in self._logs:
            raise SessionStateError("the mailbox of this session is gone", reason="MAILBOX_LOST")
        return self._logs[log_id]


class _MailboxActor:
    """A :class:`MailboxRoom` in a process of its own.

    It has no concurrency groups: Ray runs each group of an async actor on an event loop of its own, and an asyncio
    event set on one loop does not wake a reader on another (measured).
    """

    def __init__(self) -> None:
        self._room = MailboxRoom()

    async def open(self, log_id: str) -> None:
        self._room.open(log_id)

    async def put(self, log_id: str, message: Control) -> int:
        return self._room.put(log_id, message)

    async def close(self, log_id: str) -> None:
        self._room.close(log_id)

    async def count(self) -> int:
        return self._room.count()

    async def unread(self, for_s: float) -> list[str]:
        return self._room.unread(for_s)

    async def poll(self, log_id: str, after_seq: int, timeout_s: float) -> list[tuple[int, Control]]:
        return await self._room.poll(log_id, after_seq, timeout_s)


def start_mailbox(max_sessions: int) -> Any:  # noqa: ANN401  (ray's handles are untyped)
    """Return the handle of a new mailbox actor that lives as long as the calling process, on the same node.

    On another node it would be a needless hop away, and its sessions would end with that node as well: one without
    generators that are in use may be taken away at any time.

    Args:
        max_sessions: Most sessions the gateway carries; each has one waiting poll, or two just after a generator died.
    """
    actor: Any = ray.remote(_MailboxActor)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(scheduling_strategy=here, num_cpus=0, max_concurrency=2 * max_sessions + SPARE_CALLS).remote()
