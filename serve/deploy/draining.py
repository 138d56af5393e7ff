"""Taking a node out of its cluster without ending anybody's session: what a pod does before it stops.

Ray marks the node as draining. Serve then starts replicas elsewhere, sends these no new sessions, and stops them when
their sessions have ended; what it does not wait for is the process that asked, so we do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from causal_forcing.errors import InvalidRequest
from serve.errors import Unavailable

POLL_S = 2.0
"""How often the node is looked at."""

PATIENCE_S = 120.0
"""How long the cluster may be silent before its node is given up: a new head needs about as long."""

REPLICA = "ServeReplica:"
"""How the names of Serve's replicas begin, among Ray's actors."""


class Cluster(Protocol):
    """What draining needs of Ray."""

    def own_node(self) -> str:
        """Return the node of this machine.

        Raises:
            InvalidRequest: If there is not just one.
            OSError: If the cluster does not answer; so it is with the others.
        """
        ...

    def drain(self, node_id: str, deadline_s: float) -> None:
        """Mark a node as draining: what is on it must have ended so many seconds from now."""
        ...

    def replicas(self, node_id: str) -> int:
        """Return how many replicas live on a node."""
        ...


@dataclass
class Clock:
    """Time, for tests to replace.

    Attributes:
        now_s: Returns seconds since some start.
        sleep: Waits.
    """

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def drain_node(cluster: Cluster, timeout_s: float, node_id: str | None = None, clock: Clock | None = None) -> int:
    """Take a node out of its cluster and wait until its replicas have ended; return how many have not in time.

    Args:
        cluster: Whose node.
        timeout_s: Longest wait.
        node_id: Which node; None is this machine's.
        clock: For tests.

    Raises:
        InvalidRequest: If no node is named and this machine does not have just one.
        Unavailable: If the cluster does not answer for some time (reason ``CLUSTER_LOST``).
    """
    clock = clock or Clock()
    end_s = clock.now_s() + timeout_s
    try:
        node = node_id or cluster.own_node()
        cluster.drain(node, timeout_s)
    except OSError as error:
        raise Unavailable(f"the cluster does not answer: {error}", reason="CLUSTER_LOST") from error
    heard_s = clock.now_s()
    left = 1
    while left and clock.now_s() < end_s:
        clock.sleep(POLL_S)
        try:
            left = cluster.replicas(node)
        except OSError as error:
            if clock.now_s() - heard_s > PATIENCE_S:
                raise Unavailable(f"the cluster does not answer any more: {error}", reason="CLUSTER_LOST") from error
        else:
            heard_s = clock.now_s()
    return left


class RayCluster:
    """The cluster that an address leads to.

    Never a driver of it: a driver dies with its raylet, and the raylet of a drained node may go first.
    """

    def __init__(self, address: str) -> None:
        from ray._private.services import canonicalize_bootstrap_address

        found = canonicalize_bootstrap_address(address)
        if found is None:
            raise InvalidRequest("address", address, "must lead to a running cluster; there is none on this machine")
        self._address: str = found

    def own_node(self) -> str:
        """Return the one live node with this machine's address."""
        from ray.util import get_node_ip_address
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        ip = get_node_ip_address()  # type: ignore[no-untyped-call]
        try:
            nodes = list_nodes(address=self._address, filters=[("node_ip", "=", ip), ("state", "=", "ALIVE")])
        except RayStateApiException as error:
            raise OSError(str(error)) from error
        if len(nodes) != 1:
            raise InvalidRequest("node_id", None, f"must be given: {len(nodes)} live nodes have the address {ip}")
        node_id: str = nodes[0].node_id
        return node_id

    def drain(self, node_id: str, deadline_s: float) -> None:
        """Ask Ray's control store, as `ray drain-node` does."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
        from ray.exceptions import RayError

        deadline_ms = int((time.time() + deadline_s) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        try:
            client = GcsClient(address=self._address)
            accepted, why = client.drain_node(node_id, reason, "the pod is being stopped", deadline_ms)
        except RayError as error:
            raise OSError(str(error)) from error
        if not accepted:
            raise OSError(f"the node may not be drained: {why}")

    def replicas(self, node_id: str) -> int:
        """Return how many of the node's live actors are replicas."""
        from ray.util.state import list_actors
        from ray.util.state.exception import RayStateApiException

        try:
            actors = list_actors(
                address=self._address, filters=[("node_id", "=", node_id), ("state", "=", "ALIVE")], limit=1000
            )
        except RayStateApiException as error:
            raise OSError(str(error)) from error
        return sum(1 for actor in actors if actor.class_name.startswith(REPLICA))
