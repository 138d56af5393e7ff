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


def service_processes() -> set[int]:
    """Return the processes of every Ray cluster on this machine."""
    titles = ("ray::", "/raylet/raylet", "/gcs/gcs_server")
    found = psutil.process_iter(["cmdline"])
    return {p.pid for p in found if any(title in " ".join(p.info["cmdline"] or []) for title in titles)}


def gone(before: set[int]) -> bool:
    """Return whether every process that was started since has ended."""
    started = [psutil.Process(pid) for pid in service_processes() - before if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(started, timeout=PATIENCE_S)
    return not alive


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(SIMULATED)
    return path


def test_the_demo_writes_a_video_prints_its_numbers_and_stops_everything(tmp_path: Path, config: Path) -> None:
    before, output = service_processes(), tmp_path / "demo.mp4"
    demo = start("demo", "--config", str(config), "--output", str(output))
    printed, said = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 0, said
    assert gone(before)
    with av.open(str(output)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 96
    for line in ("TTFC", "FPS", "prompt latency  0.", "wrote"):
        assert line in printed
    assert "random weights" in said


def test_a_terminated_service_stops_everything(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, port = service_processes(), str(free_port())
    options = ["--config", str(config), "--grpc-port", port, "--http-port", str(free_port())]
    service = start("serve", *options)
    assert service.stdout is not None
    assert f"serving on 127.0.0.1:{port}" in service.stdout.readline()
    assert main(["stream", "--server", f"127.0.0.1:{port}", "--prompt", "a fox", "--seconds", "1"]) == 0
    assert "frames          16" in capsys.readouterr().out
    service.send_signal(signal.SIGTERM)
    _, said = service.communicate(timeout=PATIENCE_S)
    assert (service.returncode, "stopped" in said) == (0, True)
    assert gone(before)


def test_a_taken_port_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--config", str(config), "--grpc-port", port]) == 2
    assert f"grpc_port: got {port}; must be a free port" in capsys.readouterr().err
