"""The exception tree: stable reasons, messages that name field, value and what is allowed, and pickling."""

import pickle

import pytest

from causal_forcing import errors
from causal_forcing.errors import CausalForcingError, InvalidRequest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CausalForcingError)]


def test_reasons_are_upper_snake_and_unique():
    reasons = [kind.default_reason for kind in KINDS]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.replace("_", "").isupper() for reason in reasons)


def test_invalid_request_names_field_value_and_what_is_allowed():
    error = InvalidRequest("height", 100, "must be a multiple of 16")
    assert str(error) == "height: got 100; must be a multiple of 16"
    assert error.metadata == {"field": "height", "value": "100", "allowed": "must be a multiple of 16"}


def test_long_values_are_cut():
    assert len(str(InvalidRequest("prompts.text", "x" * 100_000, "must be short"))) < 200


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not InvalidRequest])
def test_errors_survive_pickling(kind):
    error = kind("went wrong", reason="SPECIAL", metadata={"chunk": "3"})
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.message, copy.reason, copy.metadata) == (
        str(error),
        "went wrong",
        "SPECIAL",
        {"chunk": "3"},
    )
    assert copy.retryable == error.retryable


def test_invalid_request_survives_pickling():
    error = InvalidRequest("seed", -1, "must be at least 0", reason="BAD_SEED")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is InvalidRequest
    assert (str(copy), copy.reason, copy.metadata) == (str(error), "BAD_SEED", error.metadata)


def test_the_tree_at_the_top_of_the_file_is_complete():
    drawn = {line.split()[1] for line in errors.__doc__.splitlines() if "──" in line}
    assert drawn == {kind.__name__ for kind in KINDS} - {"CausalForcingError"}
