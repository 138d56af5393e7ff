"""What changed between two calls of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import Blend, SwitchPolicy
from causal_forcing.scope.requests import Parameters, Start, parse_prompts, parse_transition

START = Start(42)
DEFAULT_STEPS = (1000, 750, 500, 250)


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def begun(clock: Clock | None = None, **given: Any) -> Parameters:
    parameters = Parameters(START, default_steps=DEFAULT_STEPS, clock=clock or Clock())
    parameters.take({"prompts": "a fox", "init_cache": True, **given})
    return parameters


def test_prompts_come_as_text_or_as_a_list() -> None:
    for prompts in ("a fox", ["a fox"], [{"text": "a fox"}], [{"text": "a fox", "weight": 1.0}]):
        update = parse_prompts({"prompts": prompts}, "recache")
        assert update is not None
        assert [(p.text, p.weight) for p in update.prompts] == [("a fox", 1.0)]
        assert update.policy is SwitchPolicy.RECACHE


def test_nothing_is_asked_for_before_there_is_a_prompt() -> None:
    parameters = Parameters(START)
    for prompts in (None, "", [], [{"text": " "}]):
        assert parameters.take({"prompts": prompts, "init_cache": True}) is None
    begins = parameters.take({"prompts": "a fox"})
    assert begins is not None
    assert begins.start == START


def test_shares_that_are_all_zero_are_equal() -> None:
    update = parse_prompts({"prompts": [{"text": "a", "weight": 0}, {"text": "b", "weight": 0}]}, "flush")
    assert update is not None
    assert [p.weight for p in update.prompts] == [1.0, 1.0]


def test_slerp_is_for_two_prompts() -> None:
    two, three = ["a", "b"], ["a", "b", "c"]
    for prompts, blend in ((two, Blend.SLERP), (three, Blend.LINEAR)):
        update = parse_prompts({"prompts": prompts, "prompt_interpolation_method": "slerp"}, "flush")
        assert update is not None
        assert update.blend is blend


def test_the_same_parameters_again_change_nothing() -> None:
    parameters = begun()
    request = parameters.take({"prompts": "a fox", "init_cache": False})
    assert request is not None
    assert request.start is None
    assert request.update is None


def test_a_new_prompt_is_a_switch_with_the_policy_of_the_call() -> None:
    request = begun().take({"prompts": "snow", "switch_policy": "recache"})
    assert request is not None
    assert request.update is not None
    assert request.update.policy is SwitchPolicy.RECACHE
    assert request.update.transition_chunks == 0


def test_a_transition_is_taken_once_and_its_end_does_not_lead_back() -> None:
    parameters = begun()
    transition = {"target_prompts": [{"text": "snow"}], "num_steps": 3, "temporal_interpolation_method": "slerp"}
    first = parameters.take({"prompts": "a fox", "transition": transition})
    assert first is not None
    assert first.update is not None
    assert (first.update.transition_chunks, first.update.transition) == (3, Blend.SLERP)
    again = parameters.take({"prompts": "a fox", "transition": transition})
    after = parameters.take({"prompts": "a fox"})
    assert again is not None
    assert after is not None
    assert again.update is after.update is None


def test_the_default_length_of_a_transition_is_scopes() -> None:
    update = parse_transition({"transition": {"target_prompts": ["snow"]}}, "flush")
    assert update is not None
    assert update.transition_chunks == 4


def test_a_reset_begins_with_what_is_shown() -> None:
    parameters = begun()
    parameters.take({"prompts": "snow"})
    request = parameters.take({"prompts": "snow", "init_cache": True})
    assert request is not None
    assert request.start == START
    assert request.update is not None
    assert request.update.prompts[0].text == "snow"


def test_seed_and_picture_are_taken_up_at_a_reset(tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    picture.write_bytes(b"png")
    parameters = begun()
    going_on = parameters.take({"prompts": "a fox", "base_seed": 7, "first_frame_image": str(picture)})
    reset = parameters.take({"prompts": "a fox", "base_seed": 7, "first_frame_image": str(picture), "init_cache": True})
    assert going_on is not None
    assert going_on.start is None
    assert reset is not None
    assert reset.start == Start(7, START.denoising_steps, b"png")


@pytest.mark.parametrize(("manage_cache", "begins"), [(True, True), (False, False)])
def test_new_steps_begin_again_only_where_the_cache_is_managed(manage_cache: bool, begins: bool) -> None:
    request = begun().take({"prompts": "a fox", "denoising_step_list": [1000, 500], "manage_cache": manage_cache})
    assert request is not None
    assert (request.start is not None) is begins


def test_the_default_steps_are_the_models_own() -> None:
    parameters = begun(denoising_step_list=list(DEFAULT_STEPS))
    same = parameters.take({"prompts": "a fox", "denoising_step_list": list(DEFAULT_STEPS)})
    other = parameters.take({"prompts": "a fox", "denoising_step_list": [1000, 500]})
    own = parameters.take({"prompts": "a fox", "denoising_step_list": list(DEFAULT_STEPS)})
    starts = [request.start for request in (same, other, own) if request is not None]
    assert starts == [None, Start(42, (1000, 500)), START]


def text_of(parameters: Parameters, given: dict[str, Any]) -> str | None:
    """Return the prompt that a call switches to."""
    request = parameters.take(given)
    assert request is not None
    return None if request.update is None else request.update.prompts[0].text


def test_a_call_that_is_taken_back_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    picture.write_bytes(b"png")
    parameters = begun()
    asked = {"prompts": "snow", "base_seed": 7, "first_frame_image": str(picture), "init_cache": True}
    assert text_of(parameters, asked) == "snow"
    parameters.take_back()
    going_on = parameters.take({"prompts": "a fox"})
    reset = parameters.take({"prompts": "a fox", "init_cache": True})
    assert going_on is not None
    assert reset is not None
    assert (going_on.start, going_on.update, reset.start) == (None, None, START)


def test_the_first_call_taken_back_leaves_a_stream_that_has_not_begun() -> None:
    parameters = begun()
    parameters.take_back()
    request = parameters.take({"prompts": "a fox"})
    assert request is not None
    assert request.start == START
    assert request.update is not None


def test_a_refused_prompt_is_not_asked_for_again_until_it_may_be() -> None:
    clock = Clock()
    parameters = begun(clock)
    for _ in range(2):  # also when it is refused again
        assert text_of(parameters, {"prompts": "snow"}) == "snow"
        assert text_of(parameters, {"prompts": "snow"}) is None  # the refusal may come calls later
        parameters.refused(7.0)
        clock.now_s += 6.9
        assert text_of(parameters, {"prompts": "snow"}) is None
        clock.now_s += 0.2
    assert text_of(parameters, {"prompts": "snow"}) == "snow"
    assert text_of(parameters, {"prompts": "snow"}) is None


def test_another_prompt_takes_the_place_of_a_refused_one() -> None:
    clock = Clock()
    parameters = begun(clock)
    text_of(parameters, {"prompts": "snow"})
    parameters.refused(7.0)
    assert text_of(parameters, {"prompts": "rain"}) == "rain"
    clock.now_s += 8
    assert text_of(parameters, {"prompts": "rain"}) is None


@pytest.mark.parametrize("refused", [{"prompts": "snow"}, {"prompts": "snow", "init_cache": True}])
def test_a_reset_does_not_show_a_refused_prompt(refused: dict[str, Any]) -> None:
    parameters = begun()
    text_of(parameters, refused)
    parameters.refused(None)
    assert text_of(parameters, {"prompts": "snow"}) is None
    assert text_of(parameters, {"prompts": "snow", "init_cache": True}) == "a fox"


def test_a_reset_that_is_refused_leaves_the_prompt_in_force() -> None:
    parameters = begun()
    text_of(parameters, {"prompts": "snow"})
    text_of(parameters, {"prompts": "snow", "init_cache": True})
    parameters.refused(None)
    assert text_of(parameters, {"prompts": "snow", "init_cache": True}) == "snow"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompts": [{"text": "a", "weight": -1}]}, "prompts.weight"),
        ({"prompts": ["a", "b"], "prompt_interpolation_method": "cubic"}, "prompt_interpolation_method"),
        ({"prompts": "b", "switch_policy": "forget"}, "switch_policy"),
        ({"prompts": "b", "first_frame_image": "/nowhere.png"}, "first_frame_image"),
        (
            {"prompts": "a fox", "transition": {"target_prompts": ["b"], "temporal_interpolation_method": "cubic"}},
            "temporal_interpolation_method",
        ),
    ],
)
def test_what_is_not_allowed_is_named_and_forgotten(given: dict[str, Any], field: str) -> None:
    parameters = begun()
    with pytest.raises(InvalidRequest) as refused:
        parameters.take(given)
    assert refused.value.metadata["field"] == field
    request = parameters.take({"prompts": "a fox"})
    assert request is not None
    assert request.update is None
