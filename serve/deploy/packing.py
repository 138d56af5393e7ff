"""How many nodes replicas need, and which of them can meet on one node: small, exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

_EPSILON = 1e-9


@dataclass(frozen=True)
class Amount:
    """CPUs and GPUs, of a node or for a replica.

    Attributes:
        cpus: CPUs as Ray counts them.
        gpus: GPUs; a fraction shares one.
    """

    cpus: float
    gpus: float = 0

    def fits(self, room: Amount) -> bool:
        """Whether this fits into some room."""
        return self.cpus <= room.cpus + _EPSILON and self.gpus <= room.gpus + _EPSILON

    def __add__(self, other: Amount) -> Amount:
        """Return both together."""
        return Amount(self.cpus + other.cpus, self.gpus + other.gpus)

    def __mul__(self, count: int) -> Amount:
        """Return this many of it."""
        return Amount(self.cpus * count, self.gpus * count)


@dataclass(frozen=True)
class Replicas:
    """What a deployment may put on the nodes of its pool.

    Attributes:
        name: Of the deployment.
        each: What one replica takes.
        fewest: Replicas there always are.
        most: Replicas there may be.
        surge: Replicas beyond that while an update replaces them.
    """

    name: str
    each: Amount
    fewest: int
    most: int
    surge: int = 0


def nodes_needed(node: Amount, replicas: Sequence[tuple[Amount, int]]) -> int:
    """Return how many equal nodes hold these replicas, largest first into the first node with room.

    Raises:
        ValueError: If one of them does not fit on an empty node.
    """
    used: list[Amount] = []
    for each, count in sorted(replicas, key=lambda item: (item[0].gpus, item[0].cpus), reverse=True):
        if not each.fits(node):
            raise ValueError(f"{each} does not fit on {node}")
        for _ in range(count):
            place = next((i for i, amount in enumerate(used) if (amount + each).fits(node)), None)
            if place is None:
                used.append(each)
            else:
                used[place] += each
    return len(used)


def full_nodes(node: Amount, deployments: Sequence[Replicas]) -> Iterator[tuple[int, ...]]:
    """Yield every number of replicas, deployment by deployment, that one node can hold at a time."""
    for counts in product(*(range(min(one.most + one.surge, _fitting(one.each, node)) + 1) for one in deployments)):
        total = sum((one.each * count for one, count in zip(deployments, counts, strict=True)), start=Amount(0))
        if total.fits(node):
            yield counts


def _fitting(each: Amount, node: Amount) -> int:
    rooms = [room / one for one, room in ((each.cpus, node.cpus), (each.gpus, node.gpus)) if one > 0]
    return math.floor(min(rooms) + _EPSILON)
