"""How many generators there should be: a policy that Serve's controller asks several times a second.

Serve's own measure, calls under way, cannot see a session that waits in admission's queue, nor tell which replicas are
idle. So the policy counts sessions where they are known, in the admission actor. Three properties of Serve shape it
(Ray 2.60): the policy runs on the controller's event loop and must not block it, so it answers from the last poll and
starts the next one; a replica is chosen to stop without regard to its load (``_get_replicas_to_stop`` in
``deployment_scheduler.py``), so the number is not lowered while that would hit a replica with a session; and this
module is pickled by value, so it holds nothing but the policy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import takewhile
from math import ceil
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingContext

from .admission.actor import find
from .admission.fleet import stop_order
from .detached import detached
from .messages import GeneratorDemand

POLL_EVERY_S = 0.25
"""How often admission is asked."""

STALE_S = 5.0
"""An answer older than this says nothing; the number of replicas stays as it is."""


def wanted_replicas(
    demand: GeneratorDemand, running: Sequence[str], target: int, sessions_per_replica: int, spare_sessions: int
) -> int:
    """Return the number of generators for the sessions there are, those that wait, and some to spare.

    Args:
        demand: From admission; generators that are being stopped are not in it.
        running: Generators that Serve keeps, oldest first.
        target: Number that Serve aims at now; what is missing from ``running`` is starting.
        sessions_per_replica: Sessions that a generator holds.
        spare_sessions: Places to keep free.
    """
    sessions = sum(demand.held.values()) + demand.waiting + spare_sessions
    needed = ceil(sessions / sessions_per_replica)
    idle = takewhile(lambda replica: demand.held.get(replica) == 0, stop_order(running, demand.nodes))
    can_stay = len(running) - sum(1 for _ in idle)
    return max(needed, min(target, can_stay))


class GeneratorPolicy:
    """What ``AutoscalingPolicy.policy_function`` names; Serve makes one instance for each deployment."""

    def __init__(self, admission: str, sessions_per_replica: int, spare_sessions: int) -> None:
        self._admission = admission
        self._sessions_per_replica = sessions_per_replica
        self._spare_sessions = spare_sessions
        self._actor: Any = None
        self._demand: GeneratorDemand | None = None
        self._polled_s = self._answered_s = float("-inf")
        self._poll: asyncio.Task[None] | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the wanted number of replicas; Serve applies its limits and delays to it."""
        running = [replica.unique_id for replica in context.running_replicas]
        self._ask(running)
        if self._demand is None or time.monotonic() - self._answered_s > STALE_S:
            return context.target_num_replicas, {}
        wanted = wanted_replicas(
            self._demand, running, context.target_num_replicas, self._sessions_per_replica, self._spare_sessions
        )
        return wanted, {}

    def _ask(self, running: list[str]) -> None:
        """Start a poll if the last one is over and long enough ago."""
        now_s = time.monotonic()
        if now_s - self._polled_s >= POLL_EVERY_S and (self._poll is None or self._poll.done()):
            self._polled_s = now_s
            self._poll = detached(self._ask_admission(running))

    async def _ask_admission(self, running: list[str]) -> None:
        try:
            if self._actor is None:
                self._actor = find(self._admission)
            self._demand = await self._actor.demand.remote(running)
            self._answered_s = time.monotonic()
        except (RayActorError, ValueError):  # it has not been started, or has ended; the next one is found by its name
            self._actor = None
