"""Prompt values: what is refused, and that the message says field, value and what is allowed."""

import pytest

from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import Blend, PromptUpdate, SwitchPolicy, WeightedPrompt

FOX, OWL = WeightedPrompt("a fox"), WeightedPrompt("an owl")


@pytest.mark.parametrize("text", ["", "   ", "\n\t", None, 7, b"fox"])
def test_blank_text_is_refused(text):
    with pytest.raises(InvalidRequest, match="prompts.text: got .*; must be text that is not blank") as caught:
        WeightedPrompt(text)
    assert caught.value.reason == "INVALID_PROMPT"


def test_over_long_text_is_refused_without_repeating_it():
    WeightedPrompt("x" * 4096)
    with pytest.raises(InvalidRequest, match="got '4097 characters'; must be at most 4096") as caught:
        WeightedPrompt("x" * 4097)
    assert "xxxx" not in str(caught.value)


@pytest.mark.parametrize("weight", [-1, -1e-9, float("nan"), float("inf"), 1e7, 10**400, "1", None, True])
def test_weights_out_of_range_are_refused(weight):
    with pytest.raises(InvalidRequest, match="prompts.weight: got .*; must be a number from 0 to 1,000,000"):
        WeightedPrompt("a fox", weight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": ()}, "prompts: got '0 prompts'; must be 1 to 8 prompts"),
        ({"prompts": (FOX,) * 9}, "prompts: got '9 prompts'; must be 1 to 8 prompts"),
        (
            {"prompts": (WeightedPrompt("a", 0), WeightedPrompt("b", 0))},
            "prompts.weight: got [0, 0]; must not all be 0",
        ),
        ({"policy": "melt"}, "policy: got 'melt'; must be one of cross_attention, recache, flush, scene_cut"),
        ({"blend": "cubic"}, "blend: got 'cubic'; must be one of linear, slerp"),
        ({"transition": "cubic"}, "transition: got 'cubic'; must be one of linear, slerp"),
        ({"blend": "slerp"}, "blend: got 'slerp of 1 prompts'; slerp needs exactly 2 prompts"),
        ({"prompts": (FOX, OWL, FOX), "blend": "slerp"}, "blend: got 'slerp of 3 prompts'; slerp needs exactly 2"),
        ({"transition_chunks": -1}, "transition_chunks: got -1; must be an integer from 0 to 256"),
        ({"transition_chunks": 257}, "transition_chunks: got 257; must be an integer from 0 to 256"),
        ({"transition_chunks": 2.0}, "transition_chunks: got 2.0; must be an integer from 0 to 256"),
        ({"transition_chunks": True}, "transition_chunks: got True; must be an integer from 0 to 256"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_updates_that_are_not_allowed_are_refused_by_name(values, message):
    with pytest.raises(InvalidRequest) as caught:
        PromptUpdate(**({"prompts": (FOX,)} | values))
    assert str(caught.value).startswith(message)
    assert caught.value.reason == "INVALID_PROMPT"


def test_names_become_values():
    update = PromptUpdate([FOX, OWL], blend="slerp", policy="flush", transition="slerp")
    assert update.prompts == (FOX, OWL)
    assert (update.blend, update.policy, update.transition) == (Blend.SLERP, SwitchPolicy.FLUSH, Blend.SLERP)
