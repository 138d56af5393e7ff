"""Which version of an application is in service: the one whose gateway began last.

Serve gives a replica no sign that it is being replaced. So a gateway that begins writes the name of its version into
Ray's control store, where it outlives every process, and the gateways of the version before read there that no
generator will come for the sessions that still wait with them.
"""

from __future__ import annotations

from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from serve.errors import Unavailable
from serve.status import Failure, failure_of

from .actor import NAMESPACE


def announce(app_name: str, version: str) -> None:
    """Say that a version of an application is in service; blocks for a call to the control store."""
    _internal_kv_put(_key(app_name), version.encode(), overwrite=True, namespace=NAMESPACE.encode())


def is_current(app_name: str, version: str) -> bool:
    """Return whether no other version is known to have been announced since; blocks for a call to the control store."""
    try:
        found = _internal_kv_get(_key(app_name), namespace=NAMESPACE.encode())
    except RayError:  # the store is being restarted
        return True
    return found is None or found == version.encode()


def _key(app_name: str) -> bytes:
    return f"version of {app_name}".encode()


def refusal(asked: str, own: str) -> Failure | None:
    """Return why a replica does not do what it is asked for; None if it is of the caller's model.

    A gateway that is being replaced goes on with its sessions, and Serve sends its calls to the replicas of the next
    version. Those of another model would make wrong frames of them.

    Args:
        asked: The caller's :attr:`~serve.config.ServiceConfig.model_key`.
        own: The replica's.
    """
    if asked == own:
        return None
    return failure_of(
        Unavailable("a version of the service with another model has taken over", reason="REPLICA_DRAINING")
    )
