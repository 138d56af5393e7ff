"""What `generate` accepts: a refusal comes before any weights are loaded, and names the option and what is allowed."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from causal_forcing.commands.request import GenerateRequest, Length, add_arguments, read_request
from causal_forcing.config import SinkRope
from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import pixel_frames
from causal_forcing.prompts import Blend, SwitchPolicy, WeightedPrompt


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
    assert made.length == Length(frames=80)
    assert made.vae == "wan"
    assert [line.update.prompts for line in made.lines] == [(WeightedPrompt("a fox"),)]


def test_every_option_reaches_the_configuration() -> None:
    words = "--size 32x48 --seed 7 --steps 1000,500 --first-chunk-steps 900 --window 9 --sink 2 --sink-rope fixed"
    config = request("--prompt", "a", *words.split(), "--anchor-every", "5").config
    assert (config.height, config.width, config.seed) == (32, 48, 7)
    assert (config.denoising_steps, config.first_chunk_steps) == ((1000, 500), (900,))
    assert (config.window_frames, config.sink_frames, config.sink_rope) == (9, 2, SinkRope.FIXED)
    assert config.anchor_every_chunks == 5


def test_weighted_prompts_are_blended() -> None:
    update = request("--prompt", "a::0.3", "--prompt", "b::0.7", "--blend", "slerp").lines[0].update
    assert update.prompts == (WeightedPrompt("a", 0.3), WeightedPrompt("b", 0.7))
    assert update.blend is Blend.SLERP


def test_options_are_the_defaults_of_a_script(script: str) -> None:
    lines = request("--script", script, "--policy", "recache", "--transition", "3").lines
    assert [line.update.policy for line in lines] == [SwitchPolicy.RECACHE, SwitchPolicy.FLUSH]
    assert [line.update.transition_chunks for line in lines] == [3, 3]


@pytest.mark.parametrize(
    ("words", "length"),
    [
        (("--seconds", "2"), Length(frames=32)),
        (("--seconds", "0.1"), Length(frames=2)),
        (("--seconds", "1m1s"), Length(frames=976)),
        (("--chunks", "3"), Length(chunks=3)),
    ],
)
def test_length(words: tuple[str, ...], length: Length) -> None:
    assert request("--prompt", "a", *words).length == length


def test_a_script_runs_five_seconds_past_its_last_line(script: str) -> None:
    assert request("--script", script).length == Length(frames=7 * 16)


@pytest.mark.parametrize("chunk_frames", [1, 3])
@pytest.mark.parametrize("frames", [1, 2, 80, 81, 82, 1000])
def test_without_a_window_there_is_room_for_the_whole_video(frames: int, chunk_frames: int) -> None:
    chunks = Length(frames=frames).chunks_needed(chunk_frames, 1)
    assert pixel_frames(chunks * chunk_frames, first=True) >= frames
    assert pixel_frames((chunks - 1) * chunk_frames, first=True) < frames


def test_window_none_keeps_every_frame() -> None:
    config = request("--prompt", "a", "--window", "none", "--seconds", "10").config
    assert config.window_frames is None
    assert config.max_frames == 1 + 41  # a start image, and 160 frames


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


def test_a_script_must_end_before_the_video_does(script: str) -> None:
    with pytest.raises(InvalidRequest, match="must be more than 2, when the last prompt begins"):
        request("--script", script, "--seconds", "2")
