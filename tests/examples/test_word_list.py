"""The example of a moderation hook."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from serve.access.moderation import Question

PATH = Path(__file__).parents[2] / "examples" / "word_list.py"


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("word_list", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.check


@pytest.mark.parametrize(
    ("prompts", "allowed"),
    [
        (("a fox", "a wolf"), True),
        (("a fox", "GORE everywhere"), False),
        (("\uff47\uff4f\uff52\uff45",), False),
        (("a gorean landscape",), True),
    ],
)
def test_words_are_found_as_words(check: Any, prompts: tuple[str, ...], allowed: bool) -> None:
    assert check(Question("session", "tenant", prompts)).allowed == allowed


def test_images_are_not_let_through_unseen(check: Any) -> None:
    assert not check(Question("session", "tenant", ("a fox",), b"image")).allowed
