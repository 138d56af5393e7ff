"""What `generate` accepts: a refusal comes before any weights are loaded, and names the option and what is allowed."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from causal_forcing.commands.request import GenerateRequest, add_arguments, read_request
from causal_forcing.config import SinkRope
from causal_forcing.errors import InvalidRequest
from causal_forcing.presets import get_preset
from causal_forcing.prompts import Blend, SwitchPolicy, WeightedPrompt
from causal_forcing.record import RecordedChunk, SessionRecord


def request(*words: str) -> GenerateRequest:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_request(parser.parse_args(words))


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.txt"
    path.write_text("0s a fox\n2s [policy=flush] snow\n")
    return str(path)


def test_defaults_are_the_presets() -> None:
    made = request("--prompt", "a fox")
    assert made.preset.name == "tiny"
    assert made.config == made.preset.session_config()
    assert (made.chunks, made.frames) == (21, 80)
    assert made.vae == "wan"
    assert [(prompt.chunk, prompt.line.update.prompts) for prompt in made.prompts] == [(0, (WeightedPrompt("a fox"),))]


def test_every_option_reaches_the_configuration() -> None:
    words = "--size 32x48 --seed 7 --steps 1000,500 --first-chunk-steps 900 --window 9 --sink 2 --sink-rope fixed"
    config = request("--prompt", "a", *words.split(), "--anchor-every", "5").config
    assert (config.height, config.width, config.seed) == (32, 48, 7)
    assert (config.denoising_steps, config.first_chunk_steps) == ((1000, 500), (900,))
    assert (config.window_frames, config.sink_frames, config.sink_rope) == (9, 2, SinkRope.FIXED)
    assert config.anchor_every_chunks == 5


def test_weighted_prompts_are_blended() -> None:
    update = request("--prompt", "a::0.3", "--prompt", "b::0.7", "--blend", "slerp").prompts[0].line.update
    assert update.prompts == (WeightedPrompt("a", 0.3), WeightedPrompt("b", 0.7))
    assert update.blend is Blend.SLERP


def test_options_are_the_defaults_of_a_script(script: str) -> None:
    prompts = request("--script", script, "--policy", "recache", "--transition", "3").prompts
    assert [prompt.line.update.policy for prompt in prompts] == [SwitchPolicy.RECACHE, SwitchPolicy.FLUSH]
    assert [prompt.line.update.transition_chunks for prompt in prompts] == [3, 3]


@pytest.mark.parametrize(
    ("words", "chunks", "frames"),
    [
        ("--seconds 2", 9, 32),
        ("--seconds 0.1", 2, 2),
        ("--seconds 0.0625", 1, 1),
        ("--seconds 1m1s", 245, 976),
        ("--chunks 3", 3, 9),
        ("--chunks 3 --preset causal-forcing-chunkwise", 3, 33),
        ("--chunks 3 --image x.png", 3, 13),
        ("--seconds 0.0625 --image x.png", 1, 1),
        ("--chunks 3 --continue-from x.mp4", 3, 12),
        ("--seconds 2 --continue-from x.mp4", 8, 32),
    ],
)
def test_length(words: str, chunks: int, frames: int) -> None:
    made = request("--prompt", "a", *words.split())
    assert (made.chunks, made.frames) == (chunks, frames)


def test_a_script_runs_five_seconds_past_its_last_line(script: str) -> None:
    assert request("--script", script).frames == 7 * 16


@pytest.mark.parametrize(("words", "frames"), [("", 41), ("--image x.png", 41), ("--continue-from x.mp4", 9 + 40)])
def test_window_none_keeps_every_frame(words: str, frames: int) -> None:
    config = request("--prompt", "a", "--window", "none", "--seconds", "10", *words.split()).config
    assert config.window_frames is None
    assert config.max_frames == frames  # 160 pixel frames: the first latent frame is one of them, or was given


def record_of(path: Path, *, frames: int, **config: object) -> str:
    """Write a record of so many latent frames, whose latents are of no interest here."""
    chunks = [RecordedChunk(1, given=False, update=None, latents=None) for _ in range(frames)]
    preset = get_preset("tiny")
    SessionRecord(preset.name, preset.session_config(**config), chunks=chunks).save(path)
    return str(path)


def test_a_record_without_a_window_is_given_room_for_what_follows(tmp_path: Path) -> None:
    record = record_of(tmp_path / "r.safetensors", frames=5, window_frames=None, sink_frames=0, max_frames=6)
    made = request("--continue-from", record, "--seconds", "1")
    assert made.record is not None
    assert made.config.max_frames == made.record.config.max_frames == 5 + 4


def test_a_record_with_a_window_keeps_its_configuration(tmp_path: Path) -> None:
    made = request("--continue-from", record_of(tmp_path / "r.safetensors", frames=5, seed=7), "--chunks", "100")
    assert made.config == get_preset("tiny").session_config(seed=7)
    assert made.prompts == ()


@pytest.mark.parametrize(("policy", "chunks", "frames"), [("flush", 4, 16), ("scene_cut", 5, 17)])
def test_a_cut_right_after_a_record_begins_with_one_frame(
    tmp_path: Path, policy: str, chunks: int, frames: int
) -> None:
    record = record_of(tmp_path / "r.safetensors", frames=5)
    words = ("--continue-from", record, "--prompt", "a", "--policy", policy)
    assert request(*words, "--chunks", str(chunks)).frames == frames
    assert request(*words, "--seconds", "1").chunks == chunks


def test_the_file_says_that_weights_are_random_and_keeps_prompts_out() -> None:
    asked = request("--prompt", "a secret wish")
    notes = dataclasses.replace(asked, preset=dataclasses.replace(asked.preset, trained=False)).notes()
    assert "RANDOM WEIGHTS" in notes["comment"]
    assert "seed 42" in notes["comment"]
    assert "secret" not in str(notes)
    for name in ("tiny", "causal-forcing-framewise"):
        assert "RANDOM" not in request("--prompt", "a", "--preset", name).notes()["comment"]


REFUSED = [
    ("", "prompt", "give --prompt TEXT or --script FILE"),
    ("--prompt a --script x.txt", "script", "not both"),
    ("--prompt a --image x.png --continue-from x.mp4", "image", "not both"),
    ("--prompt a --size 64", "size", "must be HEIGHTxWIDTH"),
    ("--prompt a --size 0x64", "height", "positive multiple of 16"),
    ("--prompt a --size 64x50", "width", "got 50; must be a positive multiple of 16"),
    ("--prompt a --seed -1", "seed", "must be an integer from 0"),
    ("--prompt a --seed 9223372036854775808", "seed", "must be an integer from 0"),
    ("--prompt a --steps 500,1000", "denoising_steps", "strictly descending"),
    ("--prompt a --steps 1001", "denoising_steps", "from 1 to 1000"),
    ("--prompt a --steps fast", "steps", "integers separated by commas"),
    ("--prompt a --window 0", "window", "must be an integer from 1 to 1024"),
    ("--prompt a --window 3 --sink 3", "sink_frames", "must be smaller than window_frames"),
    ("--prompt a --window none --sink 3", "sink_frames", "must be 0 without a window"),
    ("--prompt a --sink-rope loose", "sink_rope", "must be 'fixed' or 'relative'"),
    ("--prompt a --anchor-every 0", "anchor_every", "must be an integer from 1"),
    ("--prompt a --preset huge", "preset", "must be one of causal-forcing-framewise"),
    ("--prompt a --vae best", "vae", "preset tiny has wan"),
    ("--prompt a --seconds 0", "seconds", "must be more than 0"),
    ("--prompt a --seconds soon", "seconds", "must be a time such as 8s"),
    ("--prompt a --chunks 0", "chunks", "must be an integer from 1"),
    ("--prompt a::0", "prompts.weight", "must not all be 0"),
    ("--prompt a --policy melt", "policy", "must be one of cross_attention"),
    ("--prompt a --policy flush", "policy", "only when the prompt changes"),
    ("--prompt a --transition 4", "transition", "only when the prompt changes"),
    ("--prompt a --blend slerp", "blend", "only with two or more --prompt"),
    ("--prompt a --restore exact", "restore", "only with --continue-from"),
    ("--prompt a --save-record x.mp4", "save_record", "must end in .safetensors"),
    ("--prompt a --save-record nowhere/x.safetensors", "save_record", "existing folder"),
    ("--continue-from missing.safetensors --seed 3", "seed", "the record being continued has it"),
    ("--continue-from missing.safetensors", "record", ""),
    ("--script missing.txt", "script", "No such file"),
]


@pytest.mark.parametrize(("words", "field", "allowed"), REFUSED, ids=[words for words, _, _ in REFUSED])
def test_refusals_name_the_option_and_what_is_allowed(words: str, field: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(*words.split())
    assert caught.value.metadata["field"] == field
    assert allowed in caught.value.message


@pytest.mark.parametrize("words", ["--seconds 1", "--seconds 2", "--seconds 2.0625", "--chunks 1", "--chunks 9"])
def test_a_video_must_show_every_line_of_its_script(script: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=r"script line 2: got '2s'; .* more than 2.0625 seconds, or than 9 chunks"):
        request("--script", script, *words.split())


@pytest.mark.parametrize("words", ["--seconds 2.07", "--chunks 10"])
def test_a_video_may_end_with_the_first_frames_of_a_prompt(script: str, words: str) -> None:
    assert request("--script", script, *words.split()).prompts[1].chunk == 9
