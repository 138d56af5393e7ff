"""A few viewers, so that there is something to see."""

from __future__ import annotations

import asyncio
import random

import grpc

from serve.client import AsyncVideoClient, AsyncVideoSession, Frame, StreamOptions, VideoServiceError
from serve.metrics import Recorder
from serve.metrics.client import ClientMeter

PROMPTS = ("a red circle", "a blue square", "a green triangle on black", "a yellow star")
"""What the viewers ask for, one after the other."""


class Viewer:
    """Watches one session after the other, and changes the prompt now and then.

    Args:
        address: ``host:port`` of the service.
        recorder: Where it tells what it sees.
        number: Of this viewer; its choices follow from it.
        seconds: Length of a session in video, on average.
    """

    def __init__(self, address: str, recorder: Recorder, number: int, *, seconds: float = 30.0) -> None:
        self._address = address
        self._recorder = recorder
        self._random = random.Random(number)
        self._seconds = seconds

    async def watch_forever(self) -> None:
        """Watch until cancelled."""
        async with AsyncVideoClient(self._address) as client:
            while True:
                await self._watch(client)
                await asyncio.sleep(self._random.expovariate(1))

    async def _watch(self, client: AsyncVideoClient) -> None:
        meter = ClientMeter(self._recorder)
        options = StreamOptions(self._random.choice(PROMPTS), seed=self._random.randrange(1 << 31))
        try:
            async with client.stream(options) as session:
                await self._follow(session, meter)
        except (VideoServiceError, grpc.aio.AioRpcError):
            meter.ended(failed=True)
            await asyncio.sleep(1)

    async def _follow(self, session: AsyncVideoSession, meter: ClientMeter) -> None:
        frames = 1 + int(16 * self._random.expovariate(1 / self._seconds))
        async for event in session:
            meter.saw(event)
            if not isinstance(event, Frame):
                continue
            if event.frame_index % 80 == 79:
                await session.update_prompt(self._random.choice(PROMPTS))
            if event.frame_index == frames:
                await session.end()


async def watch(address: str, recorder: Recorder, viewers: int) -> None:
    """Let some viewers watch until cancelled."""
    async with asyncio.TaskGroup() as group:
        for number in range(viewers):
            group.create_task(Viewer(address, recorder, number).watch_forever())
