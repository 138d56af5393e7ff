"""Sessions of every kind of end leave no task, lease, log, cache or claim behind in their process."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from itertools import cycle, islice

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.errors import EndedByOperator, Unavailable
from serve.gateway.session import LiveSession
from serve.messages import PackedTensor
from tests.serve.fakes import Client, FakeBackends, open_session

SESSIONS = 400


async def until_a_chunk(client: Client, backends: FakeBackends, then: Callable[[Client], None]) -> None:
    """Have a session that does something once it has seen a chunk, and read it to its end."""
    seen = False
    async with aclosing(open_session(backends, client).messages()) as messages:
        async for message in messages:
            if message.frame.last_in_chunk:
                if not seen:
                    then(client)
                seen = True


async def ends(backends: FakeBackends) -> None:
    client = Client()
    client.config()
    await until_a_chunk(client, backends, lambda client: client.send(end=pb.End()))


async def half_closes(backends: FakeBackends) -> None:
    client = Client()
    client.config()
    await until_a_chunk(client, backends, lambda client: client.half_close())


async def is_cut_off(backends: FakeBackends) -> None:
    client = Client()
    client.config()
    await until_a_chunk(client, backends, lambda client: client.fail(ConnectionError("reset")))


async def leaves_at_once(backends: FakeBackends) -> None:
    client = Client()
    client.config()
    messages = open_session(backends, client).messages()
    await anext(messages)
    await messages.aclose()


async def is_refused(backends: FakeBackends) -> None:
    client = Client()
    client.config(height=16, width=4096)
    await until_a_chunk(client, backends, lambda _: None)


async def loses_its_generator_and_goes_on(backends: FakeBackends) -> None:
    backends.losses.append(1)
    client = Client()
    client.config(credit_chunks=8)
    client.prompt("another", prompt_id="second")
    await until_a_chunk(client, backends, lambda client: client.send(end=pb.End()))


async def loses_its_decoder(backends: FakeBackends) -> None:
    backends.decode_failures.append(Unavailable("gone", reason="DECODER_LOST"))
    client = Client()
    client.config()
    await until_a_chunk(client, backends, lambda _: None)


async def is_ended_by_an_operator(backends: FakeBackends) -> None:
    client = Client()
    client.config()
    live = open_session(backends, client)
    async with aclosing(live.messages()) as messages:
        async for message in messages:
            if message.HasField("session_started"):
                live.end(EndedByOperator("an operator has ended this session"))


KINDS: tuple[Callable[[FakeBackends], Awaitable[None]], ...] = (
    ends,
    half_closes,
    is_cut_off,
    leaves_at_once,
    is_refused,
    loses_its_generator_and_goes_on,
    loses_its_decoder,
    is_ended_by_an_operator,
)


async def test_sessions_leave_nothing_behind_in_their_process() -> None:
    backends = FakeBackends()
    async with asyncio.timeout(100):
        for kind in KINDS:
            await kind(backends)
        before = len(asyncio.all_tasks())
        for kind in islice(cycle(KINDS), SESSIONS):
            await kind(backends)
            assert backends.is_clean, kind.__name__
        while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110  (a cancelled poll ends one turn later)
            await asyncio.sleep(0)
    assert backends.losses == []
    assert backends.decode_failures == []


def held_bytes() -> int:
    """Return the bytes of all arrays that anything in this process still refers to, in cycles or not."""
    return sum(some.data.nbytes for some in gc.get_objects() if type(some) is PackedTensor)


async def test_what_is_large_goes_with_the_session_and_not_with_the_garbage_collector() -> None:
    backends = FakeBackends()
    gc.collect()
    gc.disable()
    try:
        before = held_bytes()
        for kind in (ends, half_closes, is_cut_off, leaves_at_once, loses_its_generator_and_goes_on):
            for _ in range(5):
                await kind(backends)
            live = [some for some in gc.get_objects() if type(some) is LiveSession]
            assert sum(some.nbytes for some in live) == 0, kind.__name__
        assert held_bytes() - before < 64 << 10
    finally:
        gc.enable()
