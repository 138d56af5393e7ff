"""How long a session is waited for: silence, missing acks, pauses and its longest life, over one clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.config import Limits
from serve.errors import ClientGone


class Patience:
    """The clocks of one session.

    Args:
        limits: What is enforced.
        expects_messages: Whether the client can send anything; one that only reads is never silent.
        clock: Seconds on a clock that only goes forward.

    Attributes:
        started_s: When the session got its generator; None before.
    """

    def __init__(
        self, limits: Limits, *, expects_messages: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._expects_messages = expects_messages
        self._clock = clock
        self._heard_s = clock()
        self.started_s: float | None = None
        self._starved_s: float | None = None
        self._paused_s: float | None = None
        self._rested_s = 0.0
        self._warned = False
        self._news = asyncio.Event()

    def heard(self) -> None:
        """Note that the client has said something."""
        self._heard_s = self._clock()

    def started(self) -> None:
        """Note that the session has a generator."""
        self.started_s = self._clock()
        self._news.set()

    def credit(self, *, left: bool) -> None:
        """Note whether the session has credit left."""
        if left:
            self._starved_s = None
        elif self._starved_s is None:
            self._starved_s = self._clock()
            self._news.set()

    def pause(self) -> None:
        """Note that the session rests; the client owes no ack meanwhile."""
        if self._paused_s is None:
            self._paused_s = self._clock()
            self._news.set()

    def resume(self) -> None:
        """Note that the session goes on; the time it has rested counts until it makes a chunk."""
        if self._paused_s is None:
            return
        now_s = self._clock()
        self._rested_s += now_s - self._paused_s
        if self._starved_s is not None:
            self._starved_s += now_s - max(self._paused_s, self._starved_s)
        self._paused_s = None
        self._news.set()

    def made_chunk(self) -> None:
        """Note that a chunk came."""
        if self._paused_s is None:
            self._rested_s = 0.0

    @property
    def is_paused(self) -> bool:
        """Whether the session rests."""
        return self._paused_s is not None

    @property
    def duration_s(self) -> float:
        """How long the session has had a generator."""
        return self._age(self.started_s)

    def verdict(self) -> pb.EndReason | None:
        """Return why the session ends now, if it does.

        Raises:
            ClientGone: If its client has gone or does not keep up.
        """
        limits = self._limits
        if self._silence_left_s <= 0:
            raise ClientGone(f"nothing came from the client for {limits.silence_timeout_s:g} s")
        if self._stall_left_s <= 0:
            waited = f"the session has waited {limits.stall_timeout_s:g} s for an ack"
            raise ClientGone(waited, reason="CLIENT_TOO_SLOW")
        if self._life_left_s <= 0:
            return pb.END_REASON_MAX_DURATION
        if self._pause_left_s <= 0:
            return pb.END_REASON_PAUSE_TIMEOUT
        return None

    def warning_s(self) -> float | None:
        """Return, once, how long the session still has when its end is near."""
        left_s = self._life_left_s
        if self._warned or self.started_s is None or left_s > self._limits.ending_notice_s:
            return None
        self._warned = True
        return left_s

    async def watch(self) -> None:
        """Return when a verdict or a warning may be due."""
        due_s = [self._silence_left_s, self._stall_left_s, self._life_left_s, self._pause_left_s]
        if not self._warned and self.started_s is not None:
            due_s.append(self._life_left_s - self._limits.ending_notice_s)
        self._news.clear()
        try:
            async with asyncio.timeout(max(0.0, min(due_s))):
                await self._news.wait()
        except TimeoutError:
            return

    @property
    def _silence_left_s(self) -> float:
        return self._limits.silence_timeout_s - (self._age(self._heard_s) if self._expects_messages else 0.0)

    @property
    def _stall_left_s(self) -> float:
        return self._limits.stall_timeout_s - (self._age(self._starved_s) if self._paused_s is None else 0.0)

    @property
    def _pause_left_s(self) -> float:
        return self._limits.pause_timeout_s - self._rested_s - self._age(self._paused_s)

    @property
    def _life_left_s(self) -> float:
        return self._limits.max_session_s - self._age(self.started_s)

    def _age(self, since_s: float | None) -> float:
        return 0.0 if since_s is None else self._clock() - since_s
