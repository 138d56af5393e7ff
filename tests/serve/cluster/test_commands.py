"""`causal-forcing demo` and `serve` as a user runs them: what they make, and that they leave nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import psutil
import pytest

from causal_forcing.cli import main
from serve.local import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SIMULATED = "engine: simulated\nsimulated: {chunk_ms: 30}\n"
PATIENCE_S = 120


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own."""
    command = [sys.executable, "-m", "causal_forcing.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0, env=os.environ
    )


def family(process: subprocess.Popen[str]) -> set[psutil.Process]:
    """Return the processes that a running command has started, theirs included."""
    try:
        return set(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def all_gone(processes: set[psutil.Process]) -> bool:
    """Return whether all of them end."""
    _, alive = psutil.wait_procs(list(processes), timeout=PATIENCE_S)
    return not alive


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(SIMULATED)
    return path


def test_the_demo_writes_a_video_prints_its_numbers_and_stops_everything(tmp_path: Path, config: Path) -> None:
    output, started = tmp_path / "demo.mp4", set[psutil.Process]()
    demo = start("demo", "--config", str(config), "--output", str(output))
    assert demo.stderr is not None
    said = ""
    for line in demo.stderr:  # it says when it starts, streams and stops
        said += line
        started |= family(demo)
    printed, _ = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 0, said
    assert len(started) > 5
    assert all_gone(started)
    with av.open(str(output)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 96
    for line in ("TTFC", "FPS", "prompt latency  0.", "wrote"):
        assert line in printed
    assert "random weights" in said  # the simulated engine has none that were trained


def test_a_terminated_service_stops_everything(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    options = ["--config", str(config), "--grpc-port", port, "--http-port", str(free_port())]
    service = start("serve", *options)
    assert service.stdout is not None
    assert f"serving on 127.0.0.1:{port}" in service.stdout.readline()
    assert main(["stream", "--server", f"127.0.0.1:{port}", "--prompt", "a fox", "--seconds", "1"]) == 0
    assert "frames          16" in capsys.readouterr().out
    started = family(service)
    service.send_signal(signal.SIGTERM)
    _, said = service.communicate(timeout=PATIENCE_S)
    assert (service.returncode, "stopped" in said) == (0, True)
    assert len(started) > 5
    assert all_gone(started)


def test_a_taken_port_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--config", str(config), "--grpc-port", port]) == 2
    assert f"grpc_port: got {port}; must be a free port" in capsys.readouterr().err
