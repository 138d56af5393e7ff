"""What stands between one client's messages and the rest of the service: its tenant's limits, and moderation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from causal_forcing.errors import NoCapacity
from causal_forcing.prompts import PromptUpdate
from serve.messages import Share
from serve.session_request import SessionRequest

from .identity import Caller
from .moderation import Moderator, Question

SpendPrompt = Callable[[str, int], Awaitable[float]]
"""Counts a tenant's prompt against so many a minute; returns 0, or the seconds after which it may come again."""


class Guard(Protocol):
    """Rules of one session beyond the protocol's."""

    @property
    def share(self) -> Share:
        """What its tenant may have of the generators."""
        ...

    async def admit(self, request: SessionRequest) -> None:
        """Return if a session may join the queue.

        Raises:
            CausalForcingError: If it may not.
        """
        ...

    async def check(self, update: PromptUpdate) -> None:
        """Return if a prompt that came while the session runs may be shown.

        Raises:
            CausalForcingError: If it may not.
        """
        ...


class OpenGuard:
    """Lets everything pass."""

    share = Share()

    async def admit(self, request: SessionRequest) -> None:
        """Return."""

    async def check(self, update: PromptUpdate) -> None:
        """Return."""


class TenantGuard:
    """The rules for one tenant's session."""

    def __init__(self, session_id: str, caller: Caller, moderator: Moderator | None, spend: SpendPrompt) -> None:
        self._session_id = session_id
        self._caller = caller
        self._moderator = moderator
        self._spend = spend
        self.share = caller.policy.share(caller.tenant)

    async def admit(self, request: SessionRequest) -> None:
        """Count the first prompt, and have it and the start image looked at."""
        await self._look_at(request.prompt, request.start_image)

    async def check(self, update: PromptUpdate) -> None:
        """Count a prompt and have it looked at."""
        await self._look_at(update, b"")

    async def _look_at(self, update: PromptUpdate, image: bytes) -> None:
        caller, limit = self._caller, self._caller.policy.prompts_per_minute
        if limit is not None and (wait_s := await self._spend(caller.tenant, limit)):
            message = f"this tenant may send {limit} prompts a minute"
            raise NoCapacity(message, reason="QUOTA_EXCEEDED", metadata={"retry_after_s": f"{wait_s:.1f}"})
        if self._moderator is not None:
            texts = tuple(prompt.text for prompt in update.prompts)
            await self._moderator.check(Question(self._session_id, caller.tenant, texts, image))
