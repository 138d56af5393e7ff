"""What operators do and see, on the real cluster: sessions, bans, bills, health."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from causal_forcing.version import __version__
from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc
from serve.client import AsyncVideoSession, Frame, Started, VideoServiceError
from tests.serve.cluster.conftest import PATIENCE_S, Cluster, collect, eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.asyncio]


PRIVATE = "a violet octahedron"


async def running(session: AsyncVideoSession) -> str:
    """Return a session's name once it shows frames."""
    name = ""
    async with asyncio.timeout(PATIENCE_S):
        async for event in session:
            if isinstance(event, Started):
                name = event.session_id
            if isinstance(event, Frame):
                return name
    raise AssertionError("the session ended before its first frame")


async def end_of(session: AsyncVideoSession) -> tuple[str, str]:
    """Return the code and the reason of a session that fails."""
    with pytest.raises(VideoServiceError) as caught:
        await collect(session, 1 << 30)
    return caught.value.code.name, caught.value.reason


async def is_served(cluster: Cluster) -> bool:
    try:
        async with cluster.session() as session:
            await running(session)
    except VideoServiceError as error:
        if error.reason != "TENANT_BANNED":
            raise
        return False
    return True


async def test_an_operator_sees_and_ends_sessions_bans_a_tenant_and_gets_the_bills(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = video_pb2_grpc.VideoServiceStub(channel)  # type: ignore[no-untyped-call]
        async with cluster.session() as session:
            ended = await running(session)
            listed = (await stub.ListSessions(pb.ListSessionsRequest())).sessions
            assert [(found.session_id, found.tenant) for found in listed] == [(ended, "local")]
            found = (await stub.GetSession(pb.GetSessionRequest(session_id=ended))).session
            assert found.state == pb.SESSION_STATE_RUNNING
            await stub.EndSession(pb.EndSessionRequest(session_id=ended))
            assert await end_of(session) == ("ABORTED", "SESSION_ENDED_BY_OPERATOR")
        await cluster.until_free()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetSession(pb.GetSessionRequest(session_id=ended))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert (caught.value.details() or "").startswith("NO_SUCH_SESSION: ")
    try:
        async with cluster.session() as session:
            banned = await running(session)
            cluster.allow("{banned: true}")
            assert await end_of(session) == ("PERMISSION_DENIED", "TENANT_BANNED")
        assert not await is_served(cluster)
    finally:
        cluster.allow("{}")
    await eventually(lambda: is_served(cluster), bool)
    await cluster.until_free()
    await eventually(lambda: asyncio.to_thread(cluster.usage), {ended, banned}.issubset)
    bills = cluster.usage()
    assert (bills[ended]["end"], bills[banned]["end"]) == ("SESSION_ENDED_BY_OPERATOR", "TENANT_BANNED")
    assert bills[ended]["complete"]
    assert bills[ended]["frame_count"] > 0
    assert bills[ended]["device_s"]["denoise"] > 0


async def test_http_says_alive_ready_and_version_and_not_ready_while_a_generator_starts(cluster: Cluster) -> None:
    assert await cluster.http("/healthz") == (200, b"ok\n")
    status, said = await cluster.http("/version")
    assert (status, json.loads(said)["version"]) == (200, __version__)
    assert (await cluster.http("/nothing"))[0] == 404
    await eventually(lambda: cluster.http("/readyz"), lambda answer: answer[0] == 200)
    cluster.kill("Generator")
    await eventually(lambda: cluster.http("/readyz"), lambda answer: answer[0] == 503 and b"Generator" in answer[1])
    await eventually(lambda: cluster.http("/readyz"), lambda answer: answer[0] == 200)
    await cluster.serves()


async def test_a_session_that_no_generator_has_the_memory_for_is_refused(cluster: Cluster) -> None:
    window = cluster.config.allowed_window_frames
    async with cluster.session(height=64, width=64, window_frames=window, sink_frames=window - 1) as session:
        assert await end_of(session) == ("INVALID_ARGUMENT", "SESSION_TOO_LARGE")
    async with cluster.session(height=64, width=64, window_frames=window) as session:
        await running(session)
    await cluster.until_free()


async def test_logs_name_sessions_and_hold_no_prompt(cluster: Cluster) -> None:
    async with cluster.session(PRIVATE) as session:
        name = await running(session)
        await session.update_prompt(f"{PRIVATE}, at night")
        await collect(session, 4)
        await session.update_prompt(PromptUpdate((WeightedPrompt(PRIVATE),), prompt_id=9 * PRIVATE))
        assert await end_of(session) == ("INVALID_ARGUMENT", "INVALID_PROMPT")
    await cluster.until_free()
    await eventually(lambda: asyncio.to_thread(cluster.logs_with, name), bool)
    assert not cluster.logs_with(PRIVATE)
