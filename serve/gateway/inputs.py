"""What a session hears from its client: the messages of a bidirectional call, or one request and then nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

from ray.exceptions import RayActorError

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.config import ServiceConfig
from serve.errors import ClientGone
from serve.session_request import SessionRequest

from .protocol import ClientEvent, Conversation
from .requests import parse_generate


class Input(Protocol):
    """One client's side of a session."""

    async def request(self) -> SessionRequest:
        """Return what the session shall be.

        Raises:
            CausalForcingError: If nothing came, or something that is not allowed.
        """
        ...

    def events(self) -> AsyncGenerator[ClientEvent | None]:
        """Yield what the client says after that, until it wants no more; None is something that we do not know yet.

        Raises:
            CausalForcingError: If it says something that is not allowed.
        """
        ...

    def sent(self, chunk: int) -> None:
        """Note that a chunk was sent, which the client may acknowledge now."""
        ...


class StreamInput:
    """The messages of StreamVideo; their end is the reliable sign that the client is gone."""

    def __init__(self, requests: AsyncIterator[pb.StreamVideoRequest], service: ServiceConfig) -> None:
        self._requests = requests
        self._conversation = Conversation(service)
        self._limit_s = service.limits.config_timeout_s

    async def request(self) -> SessionRequest:
        """Return the session's checked config."""
        try:
            async with asyncio.timeout(self._limit_s):
                async for message in self._requests:
                    event = self._conversation.receive(message)
                    if isinstance(event, SessionRequest):
                        return event
        except TimeoutError:
            raise ClientGone(f"no config came within {self._limit_s:g} s") from None
        except RayActorError:
            pass  # the proxy died, and the client's connection with it
        raise self._conversation.without_config()

    async def events(self) -> AsyncGenerator[ClientEvent | None]:
        """Yield checked messages until the client ends its half of the call."""
        try:
            async for message in self._requests:
                event = self._conversation.receive(message)
                if isinstance(event, pb.End):
                    return
                yield event
        except RayActorError:
            return  # the proxy died, and the client's connection with it

    def sent(self, chunk: int) -> None:
        """Note that a chunk was sent."""
        self._conversation.sent_chunk = chunk


class OneRequest:
    """The request of GenerateVideo; nothing follows it, and only a cancel tells that its client is gone."""

    def __init__(self, request: pb.GenerateVideoRequest, service: ServiceConfig) -> None:
        self._request = request
        self._service = service

    async def request(self) -> SessionRequest:
        """Return the checked request."""
        return parse_generate(self._request, self._service)

    async def events(self) -> AsyncGenerator[ClientEvent | None]:
        """Yield nothing, for ever."""
        yield await asyncio.get_running_loop().create_future()

    def sent(self, chunk: int) -> None:
        """Do nothing: there are no acks."""
