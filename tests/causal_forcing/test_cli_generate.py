"""`generate` writes the video that a session makes, chunk by chunk, and continues where another one ended."""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from causal_forcing import cli
from causal_forcing.commands import generate
from causal_forcing.config import TransformerConfig, VaeConfig
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest
from causal_forcing.media import read_image, to_frames
from causal_forcing.presets import get_preset
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.record import SessionRecord
from causal_forcing.session import Session
from causal_forcing.startup import StartUp
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import WanVae
from serve.local import free_port
from serve.metrics.engine import EngineMeter

LOAD = Engine.load
"""What the fixture below replaces."""


class HashedText:
    """Stands in for the text encoder: embeddings that depend on the text alone."""

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config

    def check(self, texts: Sequence[str]) -> None:
        if any(len(text) > 20 for text in texts):
            raise InvalidRequest("prompts.text", "99 tokens", "must be at most 3 tokens", reason="INVALID_PROMPT")

    def encode(self, texts: Sequence[str]) -> list[PromptEmbedding]:
        self.check(texts)
        return [self._embed(text) for text in texts]

    def _embed(self, text: str) -> PromptEmbedding:
        key = hashlib.sha256(text.encode()).hexdigest()
        random = torch.Generator().manual_seed(int(key[:8], 16))
        return PromptEmbedding(torch.randn(1, self.config.text_len, self.config.text_dim, generator=random), key)


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(0)
    config = TransformerConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=16, text_len=4)
    transformer = CausalTransformer(config)
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    preset = replace(get_preset("tiny"), transformer=config, height=16, width=32, window_frames=5)
    return Engine(preset, transformer, WanVae(VaeConfig(base_dim=4)), HashedText(config))


@pytest.fixture
def command(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `generate` with a very small model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "load", lambda *_args, **_options: engine)
    monkeypatch.setattr("causal_forcing.commands.request.get_preset", lambda _name: engine.preset)
    return lambda *words: cli.main(["generate", "--quiet", *words])


def frames_of(session: Session, count: int) -> np.ndarray:
    return np.concatenate([to_frames(session.decode(session.generate_chunk())) for _ in range(count)])


def prompt(text: str, **options: object) -> PromptUpdate:
    return PromptUpdate((WeightedPrompt(text),), **options)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("f*.png"))])


def test_the_frames_are_the_sessions(command, engine: Engine, tmp_path: Path, capsys) -> None:
    assert command("--prompt", "a fox", "--chunks", "4", "--seed", "3", "-o", "f%02d.png") == 0
    session = engine.new_session(engine.session_config(seed=3))
    session.update_prompt(prompt("a fox"))
    assert np.array_equal(pictures(tmp_path), frames_of(session, 4))
    shown = capsys.readouterr()
    assert "wrote f%02d.png: 13 frames (0.81 s), TTFC 0." in shown.out
    assert re.search(
        r"cold start [\d.]+ s \(import [\d.]+, first chunk [\d.]+\)", shown.out
    )  # a stand-in loads nothing
    assert "random weights" not in shown.err


def test_the_warm_up_shows_how_far_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    def load(*_args: object, startup: StartUp, **_options: object) -> Engine:
        startup.on_warm_up(1, 2)
        startup.on_warm_up(2, 2)
        return engine

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr("causal_forcing.commands.request.get_preset", lambda _name: engine.preset)
    assert (
        cli.main(["generate", "--compile", "--prompt", "a fox", "--chunks", "1", "-o", str(tmp_path / "f%d.png")]) == 0
    )
    assert "compiling: 1 of 2 chunks\rcompiling: 2 of 2 chunks\n" in capsys.readouterr().err


def test_a_video_has_exactly_the_length_asked_for_and_says_what_it_is(command, tmp_path: Path) -> None:
    assert command("--prompt", "a fox", "--seconds", "0.5") == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert "RANDOM WEIGHTS" not in container.metadata["comment"]
        assert container.metadata["title"] == "Causal Forcing, preset tiny"
        assert sum(1 for _ in container.decode(video=0)) == 8


def test_a_script_switches_prompts_at_their_chunks(command, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "script.txt").write_text("0s a fox\n0.5s [policy=recache] snow\n1s [policy=scene_cut] night\n")
    assert command("--script", "script.txt", "--seconds", "1.5", "-o", "f%02d.png") == 0
    session = engine.new_session()
    session.update_prompt(prompt("a fox"))
    expected = [frames_of(session, 3)]  # frames 0 to 8; 0.5 s is frame 8, so the next chunk shows the switch
    session.update_prompt(prompt("snow", policy="recache"))
    expected += [frames_of(session, 2)]  # to frame 16, 1 s
    session.update_prompt(prompt("night", policy="scene_cut"))
    expected += [frames_of(session, 3)]
    assert np.array_equal(pictures(tmp_path), np.concatenate(expected)[:24])


def test_a_start_image_is_the_first_frame(command, engine: Engine, tmp_path: Path) -> None:
    Image.effect_noise((64, 32), 90).save(tmp_path / "start.png")
    assert command("--prompt", "a fox", "--image", "start.png", "--chunks", "2", "-o", "f%02d.png") == 0
    session = engine.new_session()
    session.update_prompt(prompt("a fox"))
    with torch.inference_mode():
        given = engine.vae.encode(read_image(tmp_path / "start.png", session.config.geometry))
    first = to_frames(session.decode(session.start_from(given)))
    assert len(first) == 1
    assert np.array_equal(pictures(tmp_path), np.concatenate([first, frames_of(session, 2)]))


def test_a_continued_video_holds_only_what_is_new(command, tmp_path: Path) -> None:
    assert command("--prompt", "a fox", "--chunks", "6", "-o", "first.mp4") == 0
    assert command("--prompt", "snow", "--continue-from", "first.mp4", "--chunks", "2", "-o", "f%02d.png") == 0
    assert len(pictures(tmp_path)) == 8


@pytest.mark.parametrize("words", [(), ("--restore", "exact")])
def test_a_record_continues_under_the_prompt_in_force(command, engine: Engine, tmp_path: Path, words) -> None:
    record = "session.safetensors"
    assert command("--prompt", "a fox", "--chunks", "3", "--save-record", record, "-o", "past.png") == 0
    assert command("--continue-from", record, *words, "--chunks", "1", "--save-record", record, "-o", "f%02d.png") == 0
    session = engine.new_session()
    session.update_prompt(prompt("a fox"))
    frames = frames_of(session, 4)
    assert np.array_equal(pictures(tmp_path), frames[-4:])  # nothing was evicted yet, so that fast is exact, too
    assert command("--continue-from", record, *words, "--chunks", "1", "-o", "f%02d.png") == 0
    assert np.array_equal(pictures(tmp_path), frames_of(session, 1))


def test_a_record_continues_under_a_new_prompt(command, engine: Engine, tmp_path: Path) -> None:
    assert command("--prompt", "a fox", "--chunks", "3", "--save-record", "s.safetensors", "-o", "past.png") == 0
    words = ("--prompt", "snow", "--policy", "flush", "--restore", "exact", "--seconds", "0.5")
    assert command("--continue-from", "s.safetensors", *words, "-o", "f%02d.png") == 0
    session = engine.new_session()
    session.update_prompt(prompt("a fox"))
    frames_of(session, 3)
    session.update_prompt(prompt("snow", policy="flush"))
    assert np.array_equal(pictures(tmp_path), frames_of(session, 2))


def test_a_record_without_a_window_continues(command, engine: Engine, tmp_path: Path) -> None:
    record = "s.safetensors"
    words = ("--save-record", record, "-o", "f%02d.png")
    assert command("--prompt", "a fox", "--window", "none", "--chunks", "3", *words) == 0
    for _ in range(2):
        assert command("--continue-from", record, "--chunks", "3", "--restore", "exact", *words) == 0
    session = engine.new_session(engine.session_config(window_frames=None, max_frames=9))
    session.update_prompt(prompt("a fox"))
    assert np.array_equal(pictures(tmp_path), frames_of(session, 9)[-12:])


def test_a_record_continues_with_a_new_scene(command, tmp_path: Path) -> None:
    """Its first latent frame is one frame of the file, and the second line comes no earlier for it."""
    (tmp_path / "script.txt").write_text("0s [policy=scene_cut] night\n0.5s snow\n")
    assert command("--prompt", "a fox", "--chunks", "3", "--save-record", "s.safetensors", "-o", "past.png") == 0
    words = ("--script", "script.txt", "--seconds", "0.75", "--save-record", "t.safetensors")
    assert command("--continue-from", "s.safetensors", *words, "-o", "f%02d.png") == 0
    assert len(pictures(tmp_path)) == 12
    chunks = SessionRecord.load(tmp_path / "t.safetensors").chunks[3:]
    assert [index for index, chunk in enumerate(chunks) if chunk.update is not None] == [0, 3]  # frames 0 and 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_finished(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    taken: list[int] = []

    def interrupt_second(self: generate.Run, frames: np.ndarray) -> None:
        write(self, frames)
        taken.append(len(frames))
        if len(taken) == 2:
            signal.raise_signal(number)

    write = generate.Run._write
    monkeypatch.setattr(generate.Run, "_write", interrupt_second)
    before = signal.getsignal(number)
    assert command("--prompt", "a fox", "--seconds", "60") == 128 + number
    assert signal.getsignal(number) is before
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_a_refused_request_writes_nothing_and_loads_nothing(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *_args, **_options: pytest.fail("loaded"))
    assert command("--prompt", "a fox", "--size", "50x50") == 2
    assert "height: got 50; must be a positive multiple of 16" in capsys.readouterr().err
    assert command("--prompt", "a fox", "-o", "out.avi") == 2
    assert command("--prompt", "a fox", "-o", "out.gif", "--seconds", "200") == 2
    assert "a GIF holds at most 2048 frames" in capsys.readouterr().err
    assert command("--prompt", "a fox", "-o", "out.gif", "--chunks", "513") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_the_model_cannot_read_is_refused_before_its_chunk(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(Session, "generate_chunk", lambda *_args, **_options: pytest.fail("generated"))
    (tmp_path / "script.txt").write_text("0s a fox\n\n1s a fox | it starts to snow heavily\n")
    assert command("--script", "script.txt") == 2
    message = "script line 3: got '1s'; prompts.text: got '99 tokens'; must be at most 3 tokens"
    assert message in capsys.readouterr().err
    assert command("--prompt", "it starts to snow heavily") == 2
    assert "script" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["script.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device tpu", "device: got 'tpu'; must be cpu, cuda or cuda:N"),
        ("--device cuda:99", "device: got 'cuda:99'; this machine has"),
        ("--lora x.safetensors::strong", "lora: got 'x.safetensors::strong'; must be FILE or FILE::SCALE"),
        ("--lora x.safetensors::11", "loras.scale: got 11.0; must be from -10 to 10"),
    ],
)
def test_what_weights_to_use_is_checked_first(
    command, words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *_args, **_options: pytest.fail("loaded"))
    assert command("--prompt", "a fox", *words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_the_memory_is_refused_with_the_arithmetic(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(Engine, "load", LOAD)
    monkeypatch.setattr("causal_forcing.engine.load_transformer", lambda *_args, **_options: pytest.fail("loaded"))
    monkeypatch.setattr("causal_forcing.engine.free_bytes", lambda _device: 10**6)
    assert command("--prompt", "a fox") == 1
    message = capsys.readouterr().err
    assert "cpu has 1.00 MB free, but generator weights " in message
    assert "(OUT_OF_MEMORY)" in message
    assert list(tmp_path.iterdir()) == []


def test_the_memory_that_a_start_takes_is_counted(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.effect_noise((64, 32), 90).save(tmp_path / "start.png")
    (tmp_path / "first.mp4").touch()
    given: list[object] = []

    def load(*_args: object, given_frames: int, **_options: object) -> Engine:
        given.append(given_frames)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "load", load)
    for words in ((), ("--image", "start.png"), ("--continue-from", "first.mp4")):
        assert command("--prompt", "a fox", *words) == 130
    assert given == [0, 1, 4]


def test_an_image_that_is_not_one_leaves_no_file(command, tmp_path: Path, capsys) -> None:
    (tmp_path / "start.png").write_text("not an image")
    assert command("--prompt", "a fox", "--image", "start.png") == 2
    assert "image: got" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["start.png"]


def test_metrics_are_served_while_the_video_is_made(tmp_path, capsys, monkeypatch):
    port, seen = free_port(), []
    holds = EngineMeter.holds

    def look(self, *given):
        holds(self, *given)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            seen.append(answer.read().decode())

    monkeypatch.setattr(EngineMeter, "holds", look)
    words = ["generate", "--quiet", "--prompt", "a fox", "--chunks", "2", "--metrics-port", str(port)]
    assert cli.main([*words, "-o", str(tmp_path / "f.mp4")]) == 0
    for stage in ("denoise", "context", "decode"):
        assert f'causal_forcing_chunk_stage_seconds_count{{stage="{stage}"}} 2.0' in seen[-1]
    assert 'causal_forcing_model_load_seconds{phase="load"}' in seen[0]
    for cache in ("kv", "decoder"):
        line = next(
            line for line in seen[-1].splitlines() if line.startswith(f'causal_forcing_cache_bytes{{cache="{cache}"}}')
        )
        assert float(line.split()[1]) > 0
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_a_port_that_is_taken_is_an_error_that_names_the_option(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert (
            cli.main(["generate", "--prompt", "a fox", "--metrics-port", str(port), "-o", str(tmp_path / "f.mp4")]) == 2
        )
    assert "metrics_port" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
