"""How gateways and generators reach admission, also when the actor that they knew has ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError, RayError

from serve.detached import detached


@dataclass(frozen=True)
class RemoteMethod:
    """A method of the actor, called as Ray's are.

    Attributes:
        remote: Returns the answer when it is awaited.
    """

    remote: Callable[..., Awaitable[Any]]


class AdmissionHandle:
    """The actor's methods, as Ray's own handle has them.

    An actor that died is started again by Ray, under the same handle; one that ended itself, or was ended, never is. A
    call that meets such a one fails like any other, and the next call goes to its successor.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        """Connect to the actor.

        Args:
            connect: Returns Ray's handle of the actor, which is started if there is none; may block.
        """
        self._connect = connect
        self._actor = connect()
        self._connecting: asyncio.Task[None] | None = None

    def __getattr__(self, name: str) -> RemoteMethod:
        return RemoteMethod(partial(self._call, name))

    async def _call(self, name: str, *args: object) -> Any:  # noqa: ANN401  (ray's handles are untyped)
        actor = self._actor
        try:
            return await getattr(actor, name).remote(*args)
        except ActorDiedError:
            if self._actor is actor:
                await self._connect_again()
            raise

    async def _connect_again(self) -> None:
        """Find the actor's successor, or start it; all whose calls have failed share one look."""
        if self._connecting is None or self._connecting.done():
            self._connecting = detached(self._look())
        await asyncio.shield(self._connecting)

    async def _look(self) -> None:
        with contextlib.suppress(RayError, ValueError):  # then the next call that fails looks again
            self._actor = await asyncio.to_thread(self._connect)
