"""Short visits to the service, each with an end of its own kind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import grpc

from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc

PATIENCE_S = 60.0
"""Longest wait for anything that a visit waits for."""


@dataclass
class Visit:
    """One call on a channel of its own.

    Attributes:
        channel: Its connection.
        call: The call.
    """

    channel: grpc.aio.Channel
    call: Any

    async def send(self, **message: Any) -> None:  # noqa: ANN401
        """Send one message."""
        await self.call.write(pb.StreamVideoRequest(**message))

    async def chunks(self, count: int) -> None:
        """Read on, acking, until so many more chunks are complete."""
        async with asyncio.timeout(PATIENCE_S):
            while count:
                message = await self.call.read()
                if message is grpc.aio.EOF or message.HasField("error"):
                    raise ConnectionError("the session ended early")
                if message.frame.last_in_chunk:
                    count -= 1
                    await self.send(ack=pb.Ack(chunk_index=message.frame.chunk_index))

    async def rest(self) -> None:
        """Read until the call is over, however that is."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass


def prompt(text: str, name: str = "first") -> pb.PromptUpdate:
    """Return a prompt."""
    return pb.PromptUpdate(prompts=[pb.WeightedPrompt(text=text)], prompt_id=name)


@asynccontextmanager
async def visit(
    address: str,
    options: Sequence[tuple[str, int]] = (),
    **fields: Any,  # noqa: ANN401
) -> AsyncIterator[Visit]:
    """Open a session; whatever is left of it at the end is dropped with its connection.

    Args:
        address: Of the service.
        options: Of the connection.
        fields: Of the configuration, where they are not the usual ones.
    """
    async with grpc.aio.insecure_channel(address, options) as channel:
        stub = video_pb2_grpc.VideoServiceStub(channel)  # type: ignore[no-untyped-call]
        opened = Visit(channel, stub.StreamVideo())
        chosen = {"pacing": pb.PACING_AS_FAST_AS_POSSIBLE, "seed": 1, "prompt": prompt("a fox"), **fields}
        await opened.send(config=pb.SessionConfig(**chosen))
        yield opened


async def politely(address: str) -> None:
    """Watch two chunks and end the session."""
    async with visit(address) as opened:
        await opened.chunks(2)
        await opened.send(end=pb.End())
        await opened.rest()


async def half_closing(address: str) -> None:
    """Watch a chunk and say that nothing more will come."""
    async with visit(address) as opened:
        await opened.chunks(1)
        await opened.call.done_writing()
        await opened.rest()


async def cancelling(address: str) -> None:
    """Watch a chunk and cancel the call."""
    async with visit(address) as opened:
        await opened.chunks(1)
        opened.call.cancel()


async def vanishing(address: str) -> None:
    """Watch a chunk and drop the connection."""
    async with visit(address) as opened:
        await opened.chunks(1)


async def not_waiting(address: str) -> None:
    """Drop the connection before anything came."""
    async with visit(address):
        pass


async def directing(address: str) -> None:
    """Change the prompt twice, pause, go on, and end."""
    async with visit(address) as opened:
        await opened.chunks(1)
        for name in ("b", "c"):
            await opened.send(prompt=prompt(f"a {name}", name))
        await opened.send(pause=pb.Pause())
        await opened.send(resume=pb.Resume())
        await opened.chunks(1)
        await opened.send(end=pb.End())
        await opened.rest()


async def wanting_too_much(address: str) -> None:
    """Ask for a size that is not served."""
    async with visit(address, height=16, width=4096) as opened:
        await opened.rest()


async def only_reading(address: str) -> None:
    """Have half a second of video made."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = video_pb2_grpc.VideoServiceStub(channel)  # type: ignore[no-untyped-call]
        request = pb.GenerateVideoRequest(config=pb.SessionConfig(prompt=prompt("a fox")))
        request.duration.FromMilliseconds(500)
        async with asyncio.timeout(PATIENCE_S):
            async for _ in stub.GenerateVideo(request):
                pass


KINDS: Mapping[str, Callable[[str], Awaitable[None]]] = MappingProxyType(
    {
        "end": politely,
        "half-close": half_closing,
        "cancel": cancelling,
        "disconnect": vanishing,
        "disconnect at once": not_waiting,
        "prompts and a pause": directing,
        "refused": wanting_too_much,
        "GenerateVideo": only_reading,
    }
)
"""Visits by how they end."""
