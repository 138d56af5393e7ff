"""A connection that can be cut as a cable can: both ends get a reset, and nobody says a word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Relay:
    """Carries bytes between clients and a server.

    Attributes:
        address: Where clients connect.
    """

    def __init__(self, server: str) -> None:
        self.address = ""
        self._host, _, self._port = server.rpartition(":")
        self._writers: list[asyncio.StreamWriter] = []

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one client's connection until it is over."""
        onward, out = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [writer, out]
        await asyncio.gather(_pump(reader, out), _pump(onward, writer), return_exceptions=True)

    def cut(self) -> None:
        """Cut every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def relay(server: str) -> AsyncIterator[Relay]:
    """Run a relay to a server, on a port of its own."""
    carrying = Relay(server)
    listening = await asyncio.start_server(carrying.carry, "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    carrying.address = f"{host}:{port}"
    try:
        yield carrying
    finally:
        carrying.cut()
        listening.close()
