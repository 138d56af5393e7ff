"""Captions of scenes in varied wording: synonyms, order, articles, stray words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from causal_forcing.training.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, Thing

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "crimson", "scarlet"),
    "orange": ("orange", "orange", "amber", "tangerine"),
    "yellow": ("yellow", "yellow", "golden", "lemon"),
    "green": ("green", "green", "emerald", "grass green"),
    "cyan": ("cyan", "cyan", "turquoise", "aqua"),
    "blue": ("blue", "blue", "cobalt", "royal blue"),
    "purple": ("purple", "purple", "violet", "indigo"),
    "pink": ("pink", "pink", "rose", "bubblegum pink"),
}
"""How each colour may be called; the first is the plain word."""

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc", "ball", "dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle", "triangle", "pyramid", "wedge"),
    "cross": ("cross", "cross", "plus", "plus sign"),
    "ring": ("ring", "ring", "hoop", "donut"),
}
"""How each shape may be called."""

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
}
"""How each size may be called."""

MOTION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("moving left", "moves to the left", "going left", "travelling leftwards", "drifts left"),
    "right": ("moving right", "moves to the right", "going right", "travelling rightwards", "drifts right"),
    "up": ("moving up", "moves up", "going up", "rising", "floats upwards"),
    "down": ("moving down", "moves down", "going down", "falling", "sinks downwards"),
    "still": ("standing still", "stays still", "not moving", "resting", "is motionless"),
    "bouncing": ("bouncing", "bounces", "bouncing up and down", "hopping", "jumps again and again"),
    "circling": ("circling", "moves in a circle", "going round and round", "orbiting", "circles around"),
    "pulsing": ("pulsing", "pulses", "growing and shrinking", "throbbing", "swells and shrinks"),
}
"""How each motion may be called; each phrase stands after a noun."""

BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "black": ("on a black background", "on black", "in the dark", "against a black backdrop"),
    "white": ("on a white background", "on white", "in front of a white wall", "against a white backdrop"),
    "gradient": ("on a gradient background", "over a grey gradient", "against a fading grey backdrop", "on a gradient"),
    "stripes": ("on a striped background", "over stripes", "in front of horizontal stripes", "against grey stripes"),
    "checkerboard": ("on a checkerboard", "over a chess board", "against a checkered backdrop", "on a checkered floor"),
}
"""How each background may be called."""

STRAY_WORDS = (
    "please", "beautiful", "4k", "wow", "cinematic", "highly detailed", "animation", "xqz", "slowly", "quietly", "nice",
)  # fmt: skip
"""Words without a meaning in this world, so that unknown ones do not break it."""

OPENINGS = ("", "", "", "", "a video of ", "there is ", "show me ", "we see ")
SIZE_OMITTED = 0.25
"""Share of objects whose size a caption leaves out."""
STRAY = 0.15


def thing_phrase(thing: Thing, rng: np.random.Generator, *, size_omitted: float = SIZE_OMITTED) -> str:
    """Return a noun phrase with its motion, e.g. ``a tiny crimson disc drifts left``."""
    size = "" if rng.random() < size_omitted else f"{_pick(rng, SIZE_WORDS[thing.size])} "
    colour, shape = _pick(rng, COLOUR_WORDS[thing.colour]), _pick(rng, SHAPE_WORDS[thing.shape])
    motion = _pick(rng, MOTION_WORDS[thing.motion])
    noun = f"{size}{colour} {shape}"
    order = rng.random()
    if order < 0.1:
        noun = f"{size}{shape} in {colour}"
    article = _pick(rng, ("a", "a", "a", "one", "the", ""))
    if article == "a" and noun[0] in "aeiou":
        article = "an"
    return f"{article} {noun} {motion}".strip()


def caption(scene: Scene, rng: np.random.Generator, *, size_omitted: float = SIZE_OMITTED) -> str:
    """Return one caption of a scene; advances ``rng``.

    Args:
        scene: What it describes.
        rng: Chooses the words.
        size_omitted: Share of objects whose size is left out.
    """
    things = " and ".join(thing_phrase(thing, rng, size_omitted=size_omitted) for thing in scene.things)
    place = _pick(rng, BACKGROUND_WORDS[scene.background])
    text = f"{place}, {things}" if rng.random() < 0.2 else f"{things} {place}"
    text = _pick(rng, OPENINGS) + text
    if rng.random() < STRAY:
        stray = _pick(rng, STRAY_WORDS) if rng.random() < 0.5 else nonsense(rng)
        text = f"{stray} {text}" if rng.random() < 0.3 else f"{text}, {stray}"
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.3 else "")


def nonsense(rng: np.random.Generator) -> str:
    """Return a word of three to eight random letters."""
    letters = rng.integers(ord("a"), ord("z") + 1, size=int(rng.integers(3, 9)))
    return "".join(chr(letter) for letter in letters)


def plain_caption(scene: Scene) -> str:
    """Return the caption in the plainest words, e.g. ``a small red circle moving left on a black background``."""
    parts = []
    for thing in scene.things:
        noun = f"{SIZE_WORDS[thing.size][0]} {COLOUR_WORDS[thing.colour][0]} {SHAPE_WORDS[thing.shape][0]}"
        parts.append(f"a {noun} {MOTION_WORDS[thing.motion][0]}")
    return f"{' and '.join(parts)} {BACKGROUND_WORDS[scene.background][0]}"


def held_out_scenes() -> Iterator[Scene]:
    """Iterate over every scene of one held-out object, 400 altogether, in a fixed shuffled order."""
    scenes = [
        Scene(background, (Thing(colour, shape, size, motion),))
        for colour in COLOURS
        for shape in SHAPES
        for size in SIZES
        for motion in MOTIONS
        for background in BACKGROUNDS
    ]
    chosen = [scene for scene in scenes if scene.held_out]
    order = np.random.default_rng(4).permutation(len(chosen))
    yield from (chosen[i] for i in order)


def vocabulary_hash() -> str:
    """Return a short hash of all wordings, part of a data set's identity."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, MOTION_WORDS, BACKGROUND_WORDS, STRAY_WORDS, OPENINGS)
    return hashlib.sha256(repr(tables).encode()).hexdigest()[:16]


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]
