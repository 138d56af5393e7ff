"""The examples run as they are, against the gateway's session on a port of this machine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import av
import pytest

from causal_forcing.prompts import SwitchPolicy
from tests.serve.fakes import FakeBackends
from tests.serve.server import serving_in_background

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving_in_background(FakeBackends()) as address:
        yield address


def run(name: str, *args: str, cwd: Path, stdin: str = "") -> str:
    """Run an example and return what it prints."""
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def director() -> ModuleType:
    spec = importlib.util.spec_from_file_location("director", EXAMPLES / "director.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["director"] = module
    spec.loader.exec_module(module)
    return module


def test_the_client_in_fifteen_lines(server: str, tmp_path: Path) -> None:
    source = (EXAMPLES / "watch.py").read_text()
    code = [line for line in source.splitlines()[1:] if line]
    assert len(code) <= 15
    done = subprocess.run(
        [sys.executable, "-c", source.replace("127.0.0.1:9000", server)], cwd=tmp_path, check=False, timeout=120
    )
    assert done.returncode == 0
    pictures = sorted(path.name for path in tmp_path.iterdir())
    assert pictures == [f"{index:05d}.jpg" for index in range(65)]


def test_a_script_is_recorded_to_its_end(server: str, tmp_path: Path) -> None:
    script = tmp_path / "story.txt"
    script.write_text("0s a fox\n1s [policy=recache] snow\n")
    said = run("record_script.py", str(script), "story.mp4", "--server", server, "--last-s", "1", cwd=tmp_path)
    assert frames_of(tmp_path / "story.mp4") == 32
    assert "line-1" in said
    assert "line-2" in said


def test_the_story_that_ships_is_a_script() -> None:
    from causal_forcing.script import read_script

    assert len(read_script(EXAMPLES / "story.txt")) == 4


def test_a_chat_directs_the_video_until_it_says_stop(server: str, tmp_path: Path) -> None:
    chat = "Ann: snow\nBob: rain\nCem: rain\n"
    arguments = ["--server", server, "--every-s", "0.5", "--seconds", "6", "--output", "show.mp4"]
    said = run("director.py", *arguments, cwd=tmp_path, stdin=chat)
    assert "prompt-1" in said
    assert "prompt-2" not in said  # one vote, one prompt
    assert frames_of(tmp_path / "show.mp4") == 96
    stopped = run("director.py", "--server", server, "--every-s", "0.5", cwd=tmp_path, stdin="/stop\n")
    assert "prompt-1" not in stopped


def test_a_chat_line_is_a_wish() -> None:
    wish = director().Wish
    assert wish.parse("Ann: make it snow: a lot\n") == wish("make it snow: a lot")
    assert wish.parse("make it snow") == wish("make it snow")
    assert wish.parse("Ann: /cut a beach") == wish("a beach", "/cut")
    assert wish.parse("/stop now") == wish("", "/stop")
    for nothing in ("", "Ann: ", "/cut", "/dance a beach"):
        assert wish.parse(nothing) is None, nothing


def test_the_most_wanted_wish_wins_and_the_latest_among_equals() -> None:
    module = director()
    snow, rain, stop = module.Wish("snow"), module.Wish("rain"), module.Wish("", "/stop")
    assert module.vote([]) is None
    assert module.vote([snow, rain]) == rain
    assert module.vote([snow, rain, snow]) == snow
    assert module.vote([snow, stop, snow]) == stop


def test_a_wish_becomes_a_switch_a_cut_or_a_transition() -> None:
    wish = director().Wish
    assert wish("snow").update().policy is SwitchPolicy.RECACHE
    assert wish("snow", "/cut").update().policy is SwitchPolicy.SCENE_CUT
    blended = wish("snow", "/blend").update()
    assert (blended.policy, blended.transition_chunks) == (SwitchPolicy.CROSS_ATTENTION, 8)


def test_a_program_may_rewrite_wishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = director()
    program = tmp_path / "loud.sh"
    program.write_text("#!/bin/sh\ntr a-z A-Z\n")
    program.chmod(0o755)
    assert module.rewrite(module.Wish("snow", "/cut"), str(program)) == module.Wish("SNOW", "/cut")
    assert module.rewrite(module.Wish("snow"), str(tmp_path / "missing")) == module.Wish("snow")
    assert "rewrite failed" in capsys.readouterr().err


def test_the_engine_in_a_program_of_its_own(tmp_path: Path) -> None:
    said = run("embed.py", "story.mp4", "--chunks", "2", cwd=tmp_path)
    assert frames_of(tmp_path / "story.mp4") == 13
    assert "wrote story.mp4" in said
