"""A script becomes prompts at chunks; what is wrong with one is said with its line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_forcing import script
from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import FRAMES_PER_SECOND, pixel_frames
from causal_forcing.prompts import Blend, SwitchPolicy, WeightedPrompt

SCRIPT = """
# a fox's afternoon
0s     a red fox in a forest

8s     [transition=4 policy=recache] it starts to snow
1m10s  [blend=slerp, transition_blend=slerp] a red fox::0.3 | a white wolf::0.7
"""


def test_a_script_is_read_line_by_line() -> None:
    first, snow, wolf = script.parse_script(SCRIPT)
    assert (first.number, first.time_s, first.update.prompts) == (3, 0.0, (WeightedPrompt("a red fox in a forest"),))
    assert first.update.policy is SwitchPolicy.CROSS_ATTENTION
    assert (snow.number, snow.time_s) == (5, 8.0)
    assert (snow.update.transition_chunks, snow.update.policy) == (4, SwitchPolicy.RECACHE)
    assert wolf.time_s == 70.0
    assert wolf.update.prompts == (WeightedPrompt("a red fox", 0.3), WeightedPrompt("a white wolf", 0.7))
    assert (wolf.update.blend, wolf.update.transition) == (Blend.SLERP, Blend.SLERP)
    assert len({line.update.prompt_id for line in (first, snow, wolf)}) == 3


def test_defaults_hold_for_lines_that_do_not_say_otherwise() -> None:
    one, two = script.parse_script("0s a\n1s [policy=flush] b", defaults={"policy": "recache", "transition": "3"})
    assert (one.update.policy, one.update.transition_chunks) == (SwitchPolicy.RECACHE, 3)
    assert (two.update.policy, two.update.transition_chunks) == (SwitchPolicy.FLUSH, 3)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("8s", 8), ("1.5s", 1.5), ("1m10s", 70), ("2m", 120), ("1h2m3.25s", 3723.25), (" 7s ", 7)],
)
def test_durations(text: str, seconds: float) -> None:
    assert script.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "8", "s", "m", "1.5", "-1s", "1s1m", "1.5m", "1e3s", "infs", "nans", "169h", "8 s"]
)
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(InvalidRequest, match="must be a time such as 8s") as caught:
        script.parse_duration(text, field="time")
    assert caught.value.metadata["field"] == "time"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a fox", WeightedPrompt("a fox")),
        (" a fox::0.7", WeightedPrompt("a fox", 0.7)),
        ("a :: b::2", WeightedPrompt("a :: b", 2.0)),
        ("ratio 16:9", WeightedPrompt("ratio 16:9")),
    ],
)
def test_weighted_prompts(text: str, prompt: WeightedPrompt) -> None:
    assert script.parse_prompt(text) == prompt


@pytest.mark.parametrize("text", ["", "  ", "::1", "a::", "a::b", "a::nan", "a::inf", "a::-1", "x" * 5000])
def test_what_is_not_a_weighted_prompt(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        script.parse_prompt(text)
    assert caught.value.reason == "INVALID_PROMPT"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^script: .*at least one line"),
        ("# only a comment", "^script: .*at least one line"),
        ("a red fox", "^script line 1: .*time: got 'a'; must be a time"),
        ("1s a fox", "^script line 1: .*the first prompt must be at 0s"),
        ("0s a\n\n8s b\n8s c", "^script line 4: .*must be later than 8s"),
        ("0s a\n8s b\n7.5s c", "^script line 3: got '7.5s c'; time: got '7.5s'; must be later than 8s"),
        ("0s", "^script line 1: .*must be text that is not blank"),
        ("0s a |", "^script line 1: .*must be text that is not blank"),
        ("0s [policy=melt] a", "^script line 1: .*policy: got 'melt'; must be one of cross_attention, recache"),
        ("0s [transition=-1] a", "^script line 1: .*transition_chunks: got '-1'; must be an integer from 0 to 256"),
        ("0s [transition=999] a", "^script line 1: .*transition_chunks: got 999"),
        ("0s [speed=2] a", "^script line 1: .*options: got 'speed=2'; each of transition"),
        ("0s [policy] a", "^script line 1: .*options: got 'policy'"),
        ("0s [policy=flush policy=flush] a", "^script line 1: .*at most once"),
        ("0s [blend=slerp] a", "^script line 1: .*slerp needs exactly 2 prompts"),
        ("0s a::0 | b::0", "^script line 1: .*must not all be 0"),
        ("0s a::x", "^script line 1: .*must be a number after ::"),
    ],
)
def test_errors_name_the_line_the_value_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        script.parse_script(text)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "script.txt"
    path.write_bytes("\ufeff0s a fox\r\n8s snow\r\n".encode())
    assert [line.time_s for line in script.read_script(path)] == [0.0, 8.0]
    path.write_bytes(b"0s \xff\xfe")
    with pytest.raises(InvalidRequest, match="^script: .*must be UTF-8"):
        script.read_script(path)
    path.write_bytes(b"#" * (script.MAX_SCRIPT_BYTES + 1))
    with pytest.raises(InvalidRequest, match="^script: .*at most 1 MiB"):
        script.read_script(path)
    with pytest.raises(InvalidRequest, match="^script: .*No such file"):
        script.read_script(tmp_path / "missing.txt")


def chunks(text: str, chunk_frames: int) -> list[int]:
    timeline = script.schedule(script.parse_script(text), chunk_frames=chunk_frames)
    return [item.chunk for item in timeline.prompts]


@pytest.mark.parametrize(
    ("text", "chunk_frames", "expected"),
    [
        ("0s a", 1, [0]),
        ("0s a\n0.05s b", 1, [0, 1]),  # chunk 0 is one frame, 1/16 s; chunk 1 starts at frame 1
        ("0s a\n0.0625s b", 1, [0, 1]),
        ("0s a\n0.07s b", 1, [0, 2]),  # frame 5
        ("0s a\n8s b", 1, [0, 33]),  # frame 129; chunk 32 starts at frame 125
        ("0s a\n8s b", 3, [0, 11]),  # frame 129; chunk 10 starts at frame 117
        ("0s a\n0.5625s b", 3, [0, 1]),  # frame 9 exactly
        ("0s a\n0.3125s [policy=scene_cut] b\n0.375s c", 1, [0, 2, 3]),  # the cut at frame 5 shows one frame
    ],
)
def test_times_become_chunks(text: str, chunk_frames: int, expected: list[int]) -> None:
    assert chunks(text, chunk_frames) == expected


@given(time_ms=st.integers(min_value=1, max_value=100_000), chunk_frames=st.sampled_from([1, 3]))
def test_a_prompt_takes_effect_at_the_first_chunk_not_before_its_time(time_ms: int, chunk_frames: int) -> None:
    _, chunk = chunks(f"0s a\n{time_ms / 1000}s b", chunk_frames)
    start_s = pixel_frames(chunk * chunk_frames, first=True) / FRAMES_PER_SECOND
    before_s = pixel_frames((chunk - 1) * chunk_frames, first=True) / FRAMES_PER_SECOND
    assert before_s < time_ms / 1000 <= start_s


@pytest.mark.parametrize(
    ("past", "first", "starts_s"),
    [
        ({"given_frames": 1}, "a", [1 / 16, 5 / 16, 9 / 16]),  # a start image is the first frame
        # a continued video is not shown again: every latent is four frames; its first prompt is that of the past, too
        ({"given_frames": 6, "given_shown": False}, "a", [0.0, 4 / 16, 8 / 16]),
        ({"given_frames": 6, "given_shown": False}, "[policy=scene_cut] a", [0.0, 4 / 16, 8 / 16]),
        # a session that goes on switches to its first prompt: a cut shows one frame first
        ({"given_frames": 6, "given_shown": False, "first_switches": True}, "a", [0.0, 4 / 16, 8 / 16]),
        (
            {"given_frames": 6, "given_shown": False, "first_switches": True},
            "[policy=scene_cut] a",
            [0.0, 1 / 16, 5 / 16],
        ),
    ],
)
def test_given_frames_move_the_chunks(past: dict[str, Any], first: str, starts_s: list[float]) -> None:
    lines = script.parse_script(f"0s {first}\n" + "\n".join(f"{s}s b" for s in starts_s[1:]))
    scheduled = script.schedule(lines, chunk_frames=1, **past)
    assert [item.chunk for item in scheduled.prompts] == [0, 1, 2]
    late = script.parse_script(f"0s {first}\n{starts_s[1] + 0.001:.4f}s b")
    assert script.schedule(late, chunk_frames=1, **past).prompts[1].chunk == 2


@given(frame=st.integers(min_value=-50, max_value=500), chunk_frames=st.sampled_from([1, 3]), latents=st.integers(0, 7))
def test_the_first_chunk_from_a_frame_on_is_the_one_that_counting_finds(
    frame: int, chunk_frames: int, latents: int
) -> None:
    scene = script.Scene(chunk=5, frame=-20, latents=latents, chunk_frames=chunk_frames)
    assert scene.chunk_from(frame) == next(n for n in itertools.count(5) if scene.start_of(n) >= frame)


def test_a_video_that_is_over_before_a_prompt_is_refused() -> None:
    lines = script.parse_script("0s a\n1s b\n\n2s [policy=scene_cut] c")
    timeline = script.schedule(lines, chunk_frames=3)
    assert timeline.prompts[-1].chunk == 3
    timeline.require_all_shown(4)
    message = r"^script line 4: got '2s'; takes effect at 2.0625s, .* more than 2.0625 seconds, or than 3 chunks"
    with pytest.raises(InvalidRequest, match=message):
        timeline.require_all_shown(3)
    script.schedule((), chunk_frames=3).require_all_shown(1)


def test_two_prompts_of_one_chunk_are_refused() -> None:
    with pytest.raises(
        InvalidRequest, match=r"^script line 3: got '0.6s'; must start a chunk of its own; .* lasts 0.75s"
    ):
        chunks("0s a\n0.57s b\n0.6s c", 3)
