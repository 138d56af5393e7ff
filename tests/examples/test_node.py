"""The Node.js client: another implementation of gRPC and of the codecs, with default channel options."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from serve.codecs.fmp4 import nal_type, split_nals
from serve.simulated import mark
from tests.serve.fakes import FakeBackends, simulated
from tests.serve.server import serving_in_background
from tests.serve.test_isolation import mark_of

FOLDER = Path(__file__).parents[2] / "examples" / "node"
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules").is_dir(), reason="its packages are not installed: npm ci --prefix examples/node"
    ),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving_in_background(FakeBackends(simulated(sizes=[[64, 64], [480, 832]]))) as address:
        yield address


def watch(server: str, *options: str, status: int = 0) -> list[dict[str, Any]]:
    """Run the example and return what it printed."""
    command = [str(NODE), str(FOLDER / "watch.mjs"), "--server", server, *options]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def frames_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "frame"]


def test_jpeg_frames_show_whose_they_are_across_a_prompt_switch(server: str) -> None:
    events = watch(server, "--frames", "29", "--seed", "77", "--prompt", "a fox", "--then", "snow")
    names = [event["event"] for event in events if event["event"] != "frame"]
    assert names == ["queueStatus", "sessionStarted", "promptApplied", "promptApplied", "sessionEnded", "status"]
    assert events[-1]["code"] == "OK"
    frames = frames_of(events)
    assert [frame["frameIndex"] for frame in frames] == list(range(len(frames)))
    assert len(frames) == events[-2]["frameCount"] >= 29
    texts = {"first": "a fox", "second": "snow"}
    assert {frame["promptId"] for frame in frames} == set(texts)
    for frame in frames:
        assert (frame["width"], frame["height"]) == (64, 64)
        painted = (mark(77) % 256, frame["chunkIndex"], mark_of(texts[frame["promptId"]]))
        assert all(abs(got - wanted) <= 3 for got, wanted in zip(frame["colour"], painted, strict=True))


def test_h264_is_an_access_unit_a_frame_and_decodes(server: str, tmp_path: Path) -> None:
    output = tmp_path / "out.h264"
    events = watch(server, "--frames", "21", "--codec", "h264_annexb", "--output", str(output))
    frames = frames_of(events)
    assert {frame["startCode"] for frame in frames} == {"00000001"}
    assert [frame["keyframe"] for frame in frames] == [True] + [False] * (len(frames) - 1)
    assert {7, 8, 5} <= set(frames[0]["nals"])
    assert all(set(frame["nals"]) == {1} for frame in frames[1:])
    data = output.read_bytes()
    assert len(data) == sum(frame["bytes"] for frame in frames)
    assert [nal_type(nal) for nal in split_nals(data)] == [nal for frame in frames for nal in frame["nals"]]
    with av.open(io.BytesIO(data), format="h264") as container:
        assert sum(1 for _ in container.decode(video=0)) == len(frames)


def test_frames_larger_than_a_message_come_in_parts(server: str, tmp_path: Path) -> None:
    output = tmp_path / "out.rgb"
    events = watch(
        server, "--size", "480x832", "--codec", "raw_rgb24", "--frames", "5", "--seed", "5", "--output", str(output)
    )
    frames = frames_of(events)
    assert {(frame["partCount"], frame["bytes"]) for frame in frames} == {(2, 480 * 832 * 3)}
    data = output.read_bytes()
    assert len(data) == sum(frame["bytes"] for frame in frames)
    assert data[0] == data[-3] == mark(5) % 256


def test_a_refusal_comes_as_a_message_and_as_the_status(server: str) -> None:
    error, status = watch(server, "--size", "32x32", status=1)
    assert (error["event"], error["reason"]) == ("error", "UNSUPPORTED_RESOLUTION")
    assert status["code"] == "INVALID_ARGUMENT"
    assert status["details"] == error["status"]["message"]
