"""A gRPC server of its own around the gateway's session: the clients' counterpart without Ray."""

from __future__ import annotations

import itertools
import threading
from asyncio import Event, new_event_loop, run_coroutine_threadsafe
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc

from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc
from serve.gateway.service import set_status
from serve.status import GATEWAY_LOST
from tests.serve.fakes import FakeBackends, open_session


class Servicer(video_pb2_grpc.VideoServiceServicer):
    """Does what the gateway deployment does."""

    def __init__(self, backends: FakeBackends) -> None:
        self._backends = backends
        self._numbers = itertools.count(1)
        self._running = 0
        self.is_idle = Event()
        self.is_idle.set()

    async def StreamVideo(self, requests: Any, context: Any) -> AsyncIterator[pb.StreamVideoResponse]:  # noqa: N802
        set_status(context, GATEWAY_LOST)
        self._running += 1
        self.is_idle.clear()
        try:
            session = open_session(self._backends, requests, f"session-{next(self._numbers)}")
            async with aclosing(session.messages()) as messages:
                async for message in messages:
                    if message.HasField("session_ended"):
                        set_status(context, None)
                    elif message.HasField("error"):
                        set_status(context, message.error)
                    yield message
        finally:
            self._running -= 1
            if not self._running:
                self.is_idle.set()


@asynccontextmanager
async def serving(backends: FakeBackends) -> AsyncIterator[str]:
    """Serve on a free port of this machine; yield the address. At the end, every call has been cleaned up."""
    server = grpc.aio.server()
    servicer = Servicer(backends)
    video_pb2_grpc.add_VideoServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        await servicer.is_idle.wait()


@contextmanager
def serving_in_background(backends: FakeBackends) -> Iterator[str]:
    """Serve on a thread, for clients that block."""
    loop = new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    context = serving(backends)
    address = run_coroutine_threadsafe(context.__aenter__(), loop).result()
    try:
        yield address
    finally:
        run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
