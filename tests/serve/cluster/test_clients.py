"""The clients through Serve's real proxies: another language, the calls about sessions, and the commands."""

from __future__ import annotations

import asyncio
from pathlib import Path

import av
import pytest

from causal_forcing.cli import main
from serve.client import AsyncVideoClient, Ended, Frame, Started, StreamOptions, VideoServiceError
from tests.examples.test_node import FOLDER, NODE, frames_of, watch
from tests.serve.cluster.conftest import PATIENCE_S, SIZE, Cluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.asyncio]


@pytest.mark.skipif(NODE is None or not (FOLDER / "node_modules").is_dir(), reason="node or its packages are missing")
@pytest.mark.parametrize("codec", ["jpeg", "h264_annexb"])
async def test_a_client_in_another_language_with_default_channels(cluster: Cluster, codec: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--frames", "21", "--codec", codec, "--size", f"{SIZE}x{SIZE}", "--output", str(output)]
    events = await asyncio.to_thread(watch, cluster.address, *options)
    frames = frames_of(events)
    assert [frame["frameIndex"] for frame in frames] == list(range(len(frames)))
    assert [event["promptId"] for event in events if event["event"] == "promptApplied"] == ["first", "second"]
    assert events[-1]["code"] == "OK"
    if codec == "h264_annexb":
        with av.open(str(output), format="h264") as container:
            assert sum(1 for _ in container.decode(video=0)) == len(frames)
    else:
        assert {(frame["width"], frame["height"]) for frame in frames} == {(SIZE, SIZE)}
    await cluster.until_free()


async def test_a_session_is_seen_and_ended_by_the_calls(cluster: Cluster) -> None:
    async with asyncio.timeout(PATIENCE_S), AsyncVideoClient(cluster.address) as client, cluster.session() as session:
        async for event in session:
            if isinstance(event, Started):
                name = event.session_id
            if isinstance(event, Frame) and event.chunk_index == 3:
                break
        assert (await client.get_session(name)).state == "RUNNING"
        await eventually(client.list_sessions, lambda found: [info.session_id for info in found] == [name])
        await eventually(client.list_sessions, lambda found: found[0].gateway_memory_bytes > 0)  # told every 2 s
        await client.end_session(name)
        with pytest.raises(VideoServiceError, match="SESSION_ENDED_BY_OPERATOR"):
            async for _ in session:
                pass
        with pytest.raises(VideoServiceError, match="NO_SUCH_SESSION"):
            await client.end_session("nothing")
    await cluster.until_free()


async def test_a_video_of_a_given_length_by_the_client(cluster: Cluster) -> None:
    options = StreamOptions("a red circle", height=SIZE, width=SIZE, frames_per_second=60)
    async with (
        asyncio.timeout(PATIENCE_S),
        AsyncVideoClient(cluster.address) as client,
        client.generate(options, 0.2) as video,
    ):
        events = [event async for event in video]
    assert isinstance(events[-1], Ended)
    assert (events[-1].reason, events[-1].frame_count) == ("COMPLETE", 13)
    await cluster.until_free()


async def test_the_commands_say_how_the_service_is(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    http = f"127.0.0.1:{cluster.config.http_port}"
    assert await asyncio.to_thread(main, ["status", "--server", cluster.address, "--http", http]) == 0
    told = capsys.readouterr().out
    assert "ready     yes" in told
    assert "sessions  0 running, 0 paused, 0 queued" in told
    assert await asyncio.to_thread(main, ["sessions", "list", "--server", cluster.address]) == 0
    assert capsys.readouterr().out.split()[0] == "session"
