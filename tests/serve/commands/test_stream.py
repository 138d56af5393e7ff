"""`causal-forcing stream` against a real gRPC server."""

from __future__ import annotations

import io
from pathlib import Path

import av
import pytest
from PIL import Image

from causal_forcing.cli import main
from serve.codecs import images
from serve.commands.live_line import LiveLine
from serve.commands.stream import MAX_IMAGE_BYTES
from serve.errors import Unavailable
from tests.serve.fakes import FakeBackends
from tests.serve.server import serving_in_background

SCRIPT = "0s a red fox\n1s [policy=scene_cut] it starts to snow\n"


def test_a_scripted_stream_becomes_a_file_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.txt").write_text(SCRIPT)
    output = tmp_path / "out.mp4"
    backends = FakeBackends()
    with serving_in_background(backends) as address:
        options = ["--server", address, "--script", str(tmp_path / "script.txt"), "--seconds", "2.5"]
        status = main(["stream", *options, "--output", str(output), "--seed", "4"])
    printed = capsys.readouterr()
    assert status == 0
    with av.open(str(output)) as container:
        assert "RANDOM WEIGHTS" in container.metadata["comment"]
        assert sum(1 for _ in container.decode(video=0)) == 40
    assert "frames          40 (2.50 s of video" in printed.out
    assert "TTFC" in printed.out
    assert "prompt latency  0." in printed.out
    assert "random weights" in printed.err
    assert backends.is_clean


def test_a_refusal_is_told_and_no_file_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.mp4"
    with serving_in_background(FakeBackends()) as address:
        status = main(["stream", "--server", address, "--prompt", "a fox", "--size", "480x832", "-o", str(output)])
    assert status == 1
    assert "UNSUPPORTED_RESOLUTION" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--size", "64"], "size: got '64'"),
        (["--prompt", "a", "--steps", "1000,x"], "steps: got '1000,x'"),
        (["--prompt", "a", "--seconds", "soon"], "seconds: got"),
        (["--prompt", "a", "--policy", "flush"], "policy: got 'flush'; has no effect"),
        (["--prompt", "a", "--output", "/nowhere/x.mp4"], "output: got"),
        (["--prompt", "a", "--output", "x.gif", "--codec", "h264_fmp4"], "output: got 'x.gif'; must end in .mp4"),
        (
            ["--prompt", "a", "--output", "x.mp4", "--codec", "h264_fmp4", "--reconnect"],
            "reconnect: got True; cannot be",
        ),
        (["--prompt", "a", "--fps", "0"], "fps: got 0; must be an integer from 1 to 60"),
        (["--prompt", "a", "--image", "/nowhere/a.png"], "image: got '/nowhere/a.png'; cannot be read"),
        (["--prompt", "a", "--image", "/dev/null"], "image: got '/dev/null'; must have 1 to 4194304 bytes"),
    ],
)
def test_options_that_are_not_right_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stream", "--server", "127.0.0.1:1", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", "--server", "127.0.0.1:1", "--prompt", "a fox"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def stream(*options: str, backends: FakeBackends | None = None) -> tuple[int, FakeBackends]:
    """Run the command against a service of its own."""
    backends = backends or FakeBackends()
    with serving_in_background(backends) as address:
        status = main(["stream", "--server", address, *options])
    assert backends.is_clean
    return status, backends


@pytest.mark.parametrize(
    ("codec", "name"), [("h264_annexb", "out.mp4"), ("h264_annexb", "out.h264"), ("h264_fmp4", "out.mp4")]
)
def test_h264_is_recorded(tmp_path: Path, codec: str, name: str) -> None:
    output = tmp_path / name
    options = ["--fps", "60", "--bit-rate", "500000", "--keyframe-interval", "8", "--credit", "4"]
    status, _ = stream("--prompt", "a fox", "--seconds", "0.4", "--codec", codec, "--output", str(output), *options)
    assert status == 0
    with av.open(str(output)) as container:
        keyframes = [frame.key_frame for frame in container.decode(video=0)]
    assert len(keyframes) >= 24
    assert [number for number, is_key in enumerate(keyframes) if is_key][:3] == [0, 8, 16]


def test_a_refusal_leaves_no_h264_file(tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    status, _ = stream("--prompt", "a fox", "--codec", "h264_annexb", "--bit-rate", "1", "--output", str(output))
    assert status == 1
    assert list(tmp_path.iterdir()) == []


def test_a_video_begins_with_the_picture_that_is_given(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 10, 30)).save(tmp_path / "start.png")
    output = tmp_path / "out_%02d.png"
    options = ["--image", str(tmp_path / "start.png"), "--codec", "png", "--seconds", "0.1", "--fps", "60"]
    status, _ = stream("--prompt", "a fox", *options, "--output", str(output))
    assert status == 0
    with Image.open(tmp_path / "out_00.png") as first:
        assert first.getpixel((0, 0)) == (200, 10, 30)


@pytest.mark.parametrize("codec", ["jpeg", "h264_annexb"])
def test_a_lost_session_is_followed_by_another_in_the_same_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codec: str
) -> None:
    output = tmp_path / "out.mp4"
    lost = Unavailable("died", reason="DECODER_LOST", metadata={"retry_after_s": "0.1"})
    backends = FakeBackends(decode_failures=[None, None, None, lost])
    options = ["--seconds", "0.6", "--fps", "60", "--codec", codec, "--output", str(output), "--reconnect"]
    status, _ = stream("--prompt", "a fox", *options, backends=backends)
    assert status == 0
    assert "the session was lost (DECODER_LOST); a new one in 0." in capsys.readouterr().err
    with av.open(str(output)) as container:
        times = [round(float(frame.time or 0.0) * 60) for frame in container.decode(video=0)]
    assert len(times) >= 36
    assert times == list(range(len(times)))


def test_live_numbers_are_rewritten_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = stream("--prompt", "a fox", "--seconds", "1", "--live", "--slow-client", "drop_to_latest")
    assert status == 0
    shown = capsys.readouterr().err
    assert "\r\x1b[K" in shown
    assert " s of video, " in shown
    assert shown.endswith("\r\x1b[K")


def test_what_is_typed_changes_the_prompt_and_the_video_ends_after_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = "/pause\n\n/dance\n/resume\n/keyframe\n[policy=nothing] rain\n[policy=scene_cut] a lighthouse\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    monkeypatch.setattr("serve.commands.stream.DEFAULT_SECONDS", 1.0)
    status, _ = stream("--prompt", "a fox", "--interactive", "--policy", "recache")
    told = capsys.readouterr()
    assert status == 0
    assert "command: got '/dance'; must be one of /pause, /resume, /keyframe, /end, or a prompt" in told.err
    assert "policy: got 'nothing'" in told.err
    assert "prompt typed-2 takes effect" in told.err
    assert "prompt latency  0." in told.out
    assert "lighthouse" not in told.err


def test_what_is_typed_ends_the_session(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/end\n"))
    status, _ = stream("--prompt", "a fox", "--interactive", "--seconds", "1h")
    assert status == 0
    assert "frames " in capsys.readouterr().out


def test_rates_are_of_the_last_seconds() -> None:
    terminal = io.StringIO()
    line = LiveLine(terminal, fps=16)
    line.show(0.0, 16, 0, "")
    line.show(0.1, 17, 0, " is not shown: too soon")
    line.show(2.0, 48, 500_000, ", more")
    line.show(10.0, 80, 500_000, "")
    line.clear()
    line.clear()
    assert terminal.getvalue().split("\r\x1b[K") == [
        "",
        "1.0 s of video, starting",
        "3.0 s of video, 16.0 FPS, 2.00 Mbit/s, more",
        "5.0 s of video, starting",
        "",
    ]


def test_the_client_and_the_service_agree_on_the_largest_picture() -> None:
    assert images.MAX_BYTES == MAX_IMAGE_BYTES
