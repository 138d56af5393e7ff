"""A moderation hook that refuses prompts with certain words: `moderation: {hook: "word_list:check"}`."""

from __future__ import annotations

import re
import unicodedata

from serve.access.moderation import Question, Verdict

WORDS = frozenset({"gore", "swastika"})
"""Refused, whatever their case and spelling in Unicode."""


def check(question: Question) -> Verdict:
    """Return whether no prompt has one of the words; it cannot judge start images, so it refuses them."""
    if question.image:
        return Verdict(False, "start image")
    for prompt in question.prompts:
        plain = unicodedata.normalize("NFKC", prompt).casefold()
        if WORDS & set(re.findall(r"\w+", plain)):
            return Verdict(False, "word list")
    return Verdict(True)
