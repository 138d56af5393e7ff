"""Routes a call to the replica that it names, and to any other when that one is gone.

Serve's default router probes two random replicas at a time, which is slow to find the one idle replica among many. The
admission actor knows which one it is, so a grant names it, and this router goes there. Two properties of Serve's
routing loop shape it (Ray 2.60, ``request_router.py``): a choice without candidates that does not ask for backoff spins
the event loop for good, so a choice is never empty and always asks for backoff; and a named replica that stays full
would be probed forever, so naming has a time limit. See docs/adr/0011-grant-names-a-replica.md.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


@runtime_checkable
class NamesReplica(Protocol):
    """A first argument that says which replica should serve the call."""

    @property
    def replica_id(self) -> str:
        """Unique id of the wanted replica; empty for any."""
        ...


@runtime_checkable
class KnowsLoads(Protocol):
    """A first argument that says how much each replica has to do."""

    @property
    def loads(self) -> Mapping[str, int]:
        """Load by unique id; a replica that is not there has none."""
        ...


class PreferredReplicaRouter(RequestRouter):
    """Tries the named replica while it is alive and the patience lasts, then every replica."""

    def initialize_state(self, patience_s: float = 2.0, **_: Any) -> None:  # noqa: ANN401  (Serve's signature)
        """Receive ``request_router_kwargs``.

        Args:
            patience_s: How long a call waits for a named replica that is alive but full.
        """
        self._patience_s = patience_s

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return ranks of replicas to try, never empty; ``candidate_replicas`` is not empty either."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        wanted = wanted_replica(pending_request)
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        patient = time.time() - pending_request.created_at < self._patience_s
        if named and patient:
            return [named]
        available = self.select_available_replicas(candidate_replicas) or candidate_replicas
        spread = least_loaded(available, loads_of(pending_request)) if patient else available
        return [random.sample(spread, len(spread))]  # Serve takes the first of those with equal queues


def loads_of(request: PendingRequest) -> Mapping[str, int]:
    """Return how much each replica has to do, as far as the call's first argument knows."""
    first = request.args[0] if request.args else None
    return first.loads if isinstance(first, KnowsLoads) else {}


def least_loaded(replicas: list[RunningReplica], loads: Mapping[str, int]) -> list[RunningReplica]:
    """Return the replicas with the least to do; all of them where nothing is known."""
    least = min(loads.get(replica.replica_id.unique_id, 0) for replica in replicas)
    return [replica for replica in replicas if loads.get(replica.replica_id.unique_id, 0) == least]


def wanted_replica(request: PendingRequest) -> str:
    """Return the unique id of the replica that the call's first argument names, or an empty string."""
    first = request.args[0] if request.args else None
    return first.replica_id if isinstance(first, NamesReplica) else ""
