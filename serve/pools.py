"""Kinds of nodes: a node belongs to a pool by a custom resource, and what runs in a pool takes a little of it."""

from __future__ import annotations

POOL_SHARE = 0.001
"""What one process takes of its pool's resource: next to nothing, for it only says where to run."""


def pool_resource(pool: str) -> str:
    """Return Ray's name of the custom resource that the nodes of a pool have."""
    return f"pool-{pool}"


def in_pool(pool: str | None) -> dict[str, float]:
    """Return the resources that put a process on the nodes of a pool; none for a process that runs anywhere."""
    return {} if pool is None else {pool_resource(pool): POOL_SHARE}
