"""Tasks that no request owns.

When a client cancels, Ray cancels the request's task and every call that was made on its behalf: also the ones that
tidy up after it, and the ones of a loop that the request happened to start (measured: an admission actor that never
heard of the end of one session in three). Ray knows whose call it is from a context variable, so a task with a
context of its own belongs to nobody.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_RUNNING: set[asyncio.Task[Any]] = set()


def detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task that goes on when the current request is cancelled; it is kept alive until it ends."""
    task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
    _RUNNING.add(task)
    task.add_done_callback(_RUNNING.discard)
    return task
