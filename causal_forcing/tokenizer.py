"""From cleaned prompt text to token ids.

Real checkpoints bring a ``tokenizer.json``; the embedded model has a small vocabulary of frequent English fragments
that falls back to single bytes, so that it accepts any text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from causal_forcing.errors import BadCheckpoint

PAD_ID = 0
"""Token that fills up a row. Source: google/umt5-xxl tokenizer_config.json."""

END_ID = 1
"""Token that ends every prompt. Source: as :data:`PAD_ID`."""

_FIRST_BYTE_ID = 3

_FRAGMENTS = (
    " a", " the", " in", " on", " of", " and", " with", " at", " to", " is", " over", " under", " by", " from", " into",
    " an", " as", " it", " its", " that", " through", " near", " down", " up", " out", " while", " for", " across",
    " red", " green", " blue", " white", " black", " yellow", " golden", " dark", " bright", " small", " large", " big",
    " old", " young", " man", " woman", " child", " people", " person", " cat", " dog", " fox", " bird", " horse",
    " fish", " car", " train", " boat", " ship", " city", " street", " house", " room", " forest", " tree", " trees",
    " mountain", " mountains", " river", " lake", " sea", " ocean", " beach", " wave", " waves", " sky", " cloud",
    " clouds", " sun", " sunset", " moon", " star", " stars", " night", " day", " light", " lights", " fire", " snow",
    " rain", " storm", " wind", " water", " flower", " flowers", " grass", " field", " desert", " garden", " road",
    " walk", " walking", " run", " running", " fly", " flying", " dance", " swim", " move", " moving", " turn", " fall",
    " falling", " start", " begins", " rise", " slow", " slowly", " fast", " camera", " shot", " view", " close",
    " wide", " cinematic", " realistic", " detailed", " style", " painting", " soft", " warm", " cold", " circle",
    " square", " triangle", " ball", " left", " right", " top", " bottom", " one", " two", " three",
    "ing", "ed", "er", "es", "ly", "tion", "ment", "ness", "able", "ful", "th", "he", "in", "an", "re", "on", "at",
    "en", "nd", "ti", "or", "te", "of", "is", "it", "al", "ar", "st", "to", "nt", "se", "ha", "as", "ou", "io", "le",
    "ve", "co", "me", "de", "hi", "ri", "ro", "ic", "ne", "ea", "ra", "ce", "li", "ch", "ll", "be", "ma", "si", "om",
    "ur", "la", "el", "ta", "ho", "us", "ee", "oo", "sh", "ck", "gh", "tr", "gr", "br", "cl", "fl", "sp", "wa", "wi",
    "lo", "pe", "di", "po", "un", "ac", "il", "et", "ge", "ut", "ol", "ot", "ow", "ay", "am", "ad", "ag", "ap", "ai",
    ", ", ". ",
)  # fmt: skip


class Tokenizer(Protocol):
    """Turns cleaned text into ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, the end token last, neither padded nor truncated."""
        ...


class FileTokenizer:
    """The tokenizer of a real checkpoint, read from ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            BadCheckpoint: If it is missing or is not a tokenizer.
        """
        from tokenizers import Tokenizer as FastTokenizer

        if not path.is_file():
            raise BadCheckpoint(f"{path}: no such tokenizer file", reason="CHECKPOINT_MISSING")
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 (the library raises bare Exception for every malformed file)
            raise BadCheckpoint(f"{path}: not a tokenizer.json ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, the end token last."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids if ids and ids[-1] == END_ID else [*ids, END_ID]


class FragmentTokenizer:
    """The embedded model's tokenizer: longest known fragment first, single bytes where none fits.

    Ids: 0 padding, 1 end, 2 unused, 3 to 258 the bytes, then the fragments.
    """

    def __init__(self) -> None:
        first = _FIRST_BYTE_ID + 256
        self._fragments = {fragment.encode(): first + index for index, fragment in enumerate(_FRAGMENTS)}
        self._longest = max(len(fragment) for fragment in self._fragments)
        self.vocab_size = first + len(self._fragments)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, the end token last."""
        data = f" {text}".lower().encode()
        ids: list[int] = []
        position = 0
        while position < len(data):
            length, token = self._match(data, position)
            ids.append(token)
            position += length
        return [*ids, END_ID]

    def _match(self, data: bytes, position: int) -> tuple[int, int]:
        for length in range(min(self._longest, len(data) - position), 1, -1):
            token = self._fragments.get(data[position : position + length])
            if token is not None:
                return length, token
        return 1, _FIRST_BYTE_ID + data[position]
