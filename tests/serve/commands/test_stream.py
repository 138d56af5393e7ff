"""`causal-forcing stream` against a real gRPC server."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from causal_forcing.cli import main
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
