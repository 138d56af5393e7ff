"""A small world that can be drawn: coloured shapes that move for ever over grey backgrounds on a torus.

Everything is a pure function of its arguments, in numpy. Objects are saturated and backgrounds are grey, so that what
is on the screen can be read back from pixels without a learned classifier (:mod:`causal_forcing.training.reader`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 64
"""Height and width of a frame in pixels; the world wraps at its edges."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "orange": (245, 135, 15),
    "yellow": (240, 225, 40),
    "green": (30, 170, 60),
    "cyan": (40, 205, 225),
    "blue": (40, 70, 235),
    "purple": (125, 45, 190),
    "pink": (250, 110, 190),
}
"""Object colours as 8-bit RGB, far apart in hue or lightness."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
"""Object shapes, all of the same outer radius."""

SIZES: dict[str, float] = {"small": 8.0, "large": 13.0}
"""Outer radius of an object in pixels."""

MOTIONS = ("left", "right", "up", "down", "still", "bouncing", "circling", "pulsing")
"""Endless motions."""

BACKGROUNDS = ("black", "white", "gradient", "stripes", "checkerboard")
"""Grey backgrounds."""

SPEED = 2.0
"""Pixels a frame of an object that travels."""

PERIOD_FRAMES = 32
"""Pixel frames of one bounce, circle or pulse, and of one trip around the torus."""

CIRCLE_RADIUS = 12.0
BOUNCE_HEIGHT = 20.0
PULSE_DEPTH = 0.3

OPENING_PHASES = {"bouncing": 0.0, "circling": 0.0, "pulsing": math.pi / 2}
"""Phases in radians at which streams begin: lowest, rightmost, largest.

A first picture alone then tells how its object goes on. One of any phase would leave several ways, and a model in doubt
draws something in between.
"""

PLACE_GRID = 16
"""Objects begin with their centre on a multiple of this, in pixels: the side of a token.

Where an object stands within a token changes all of its latents; free places make many more first pictures to learn.
"""

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Thing:
    """One object: four words that say what it is and does."""

    colour: str
    shape: str
    size: str
    motion: str

    @property
    def held_out(self) -> bool:
        """Whether this combination of colour, shape and motion never occurs in training (one in eight)."""
        colour, shape, motion = list(COLOURS).index(self.colour), SHAPES.index(self.shape), MOTIONS.index(self.motion)
        return (colour + 3 * shape + 5 * motion) % len(COLOURS) == 0


@dataclass(frozen=True)
class Scene:
    """A background and one or two objects of different colours."""

    background: str
    things: tuple[Thing, ...]

    @property
    def held_out(self) -> bool:
        """Whether any object is a held-out combination."""
        return any(thing.held_out for thing in self.things)


@dataclass(frozen=True)
class Placement:
    """Where an object is when a segment of a clip starts.

    Attributes:
        x: Column of its centre in pixels.
        y: Row of its centre in pixels.
        phase: Phase of its periodic motion in radians.
    """

    x: float
    y: float
    phase: float


@dataclass(frozen=True)
class Segment:
    """A stretch of a clip under one scene.

    Attributes:
        scene: What is shown.
        frames: Its length in pixel frames.
        placements: One for each object, at the segment's first frame.
    """

    scene: Scene
    frames: int
    placements: tuple[Placement, ...]


def path(motion: str, start: Placement, frames: int) -> FloatArray:
    """Return column, row and size factor of an object over time.

    Args:
        motion: One of :data:`MOTIONS`.
        start: Its placement at frame 0.
        frames: Pixel frames.

    Returns:
        ``[frames, 3]`` float32; positions are not wrapped.
    """
    time = np.arange(frames, dtype=np.float64)
    x, y, scale = np.full(frames, start.x), np.full(frames, start.y), np.ones(frames)
    angle = start.phase + 2 * math.pi * time / PERIOD_FRAMES
    if motion in ("left", "right"):
        x = x + (SPEED if motion == "right" else -SPEED) * time
    elif motion in ("up", "down"):
        y = y + (SPEED if motion == "down" else -SPEED) * time
    elif motion == "bouncing":
        y = y - BOUNCE_HEIGHT * (np.abs(np.sin(angle / 2)) - abs(math.sin(start.phase / 2)))
    elif motion == "circling":
        x = x + CIRCLE_RADIUS * (np.cos(angle) - math.cos(start.phase))
        y = y + CIRCLE_RADIUS * (np.sin(angle) - math.sin(start.phase))
    elif motion == "pulsing":
        scale = 1 + PULSE_DEPTH * np.sin(angle)
    elif motion != "still":
        raise ValueError(f"unknown motion {motion!r}")
    return np.stack([x, y, scale], axis=1).astype(np.float32)


def _distance(shape: str, dx: FloatArray, dy: FloatArray, radius: FloatArray) -> FloatArray:
    """Return the signed distance in pixels to a shape's outline, negative inside."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(dx, dy) - 0.74 * radius) - 0.26 * radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
    elif shape == "cross":
        long, short = radius, 0.32 * radius
        upright = np.maximum(np.abs(dx) - short, np.abs(dy) - long)
        distance = np.minimum(upright, np.maximum(np.abs(dx) - long, np.abs(dy) - short))
    elif shape == "triangle":
        slope = math.sqrt(3) / 2
        centred = dy - 0.17 * radius
        distance = np.maximum(slope * np.abs(dx) - 0.5 * centred, centred) - 0.58 * radius
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return np.asarray(distance)


def coverage(shape: str, track: FloatArray, radius: float, side: int = SIDE) -> FloatArray:
    """Return how much of each pixel an object covers.

    Args:
        shape: One of :data:`SHAPES`.
        track: ``[T, 3]`` from :func:`path`.
        radius: Outer radius in pixels at size factor 1.
        side: Frame size in pixels; the object wraps at the edges.

    Returns:
        ``[T, side, side]`` float32 in 0 to 1, anti-aliased over one pixel.
    """
    grid = np.arange(side, dtype=np.float32) + 0.5
    dx = (grid[None, None, :] - track[:, 0, None, None] + side / 2) % side - side / 2
    dy = (grid[None, :, None] - track[:, 1, None, None] + side / 2) % side - side / 2
    distance = _distance(shape, dx, dy, track[:, 2, None, None] * np.float32(radius))
    cover: FloatArray = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    return cover


def background(name: str, side: int = SIDE) -> FloatArray:
    """Return a background's grey level, ``[side, side]`` float32 in 0 to 1."""
    row, column = np.mgrid[0:side, 0:side]
    if name == "black":
        level = np.full((side, side), 0.06)
    elif name == "white":
        level = np.full((side, side), 0.95)
    elif name == "gradient":
        level = 0.12 + 0.76 * (row + 0.5) / side
    elif name == "stripes":
        level = np.where(row // 8 % 2 == 0, 0.28, 0.55)
    elif name == "checkerboard":
        level = np.where((row // 16 + column // 16) % 2 == 0, 0.40, 0.72)
    else:
        raise ValueError(f"unknown background {name!r}")
    return level.astype(np.float32)


def render_segment(segment: Segment) -> NDArray[np.uint8]:
    """Return the frames of one segment, ``[T, side, side, 3]`` uint8 RGB."""
    frame = np.repeat(background(segment.scene.background)[None, :, :, None], 3, axis=3)
    frames = np.repeat(frame, segment.frames, axis=0)
    for thing, start in zip(segment.scene.things, segment.placements, strict=True):
        track = path(thing.motion, start, segment.frames)
        alpha = coverage(thing.shape, track, SIZES[thing.size])[..., None]
        frames = frames * (1 - alpha) + alpha * np.asarray(COLOURS[thing.colour], dtype=np.float32) / 255
    return (frames * 255 + 0.5).astype(np.uint8)


def render(segments: Sequence[Segment]) -> NDArray[np.uint8]:
    """Return the frames of a whole clip, ``[T, side, side, 3]`` uint8 RGB."""
    return np.concatenate([render_segment(segment) for segment in segments])


def draw_thing(rng: np.random.Generator, *, held_out: bool = False) -> Thing:
    """Return a random object that is (or is not) a held-out combination; advances ``rng``."""
    while True:
        thing = Thing(
            str(rng.choice(list(COLOURS))),
            str(rng.choice(SHAPES)),
            str(rng.choice(list(SIZES))),
            str(rng.choice(MOTIONS)),
        )
        if thing.held_out == held_out:
            return thing


def draw_scene(rng: np.random.Generator, *, two_objects: float = 0.0, held_out: bool = False) -> Scene:
    """Return a random scene; advances ``rng``.

    Args:
        rng: Source of randomness.
        two_objects: Probability of a second object, of another colour.
        held_out: Whether every object is to be a held-out combination, or none.
    """
    things = [draw_thing(rng, held_out=held_out)]
    if rng.random() < two_objects:
        other = draw_thing(rng, held_out=held_out)
        while other.colour == things[0].colour:
            other = draw_thing(rng, held_out=held_out)
        things.append(other)
    return Scene(str(rng.choice(BACKGROUNDS)), tuple(things))


def draw_placement(rng: np.random.Generator, thing: Thing, *, opening: bool = False) -> Placement:
    """Return a random start on the grid; objects that stay near it start where all of their path is on the screen.

    Args:
        rng: Source of randomness; advanced.
        thing: What is placed.
        opening: Whether a periodic motion starts at its phase of ``OPENING_PHASES`` instead of at any.
    """
    while True:
        phase = float(rng.uniform(0, 2 * math.pi))
        if opening:
            phase = OPENING_PHASES.get(thing.motion, phase)
        low, high = _start_area(thing, phase)
        first, last = np.ceil(low / PLACE_GRID), np.floor(high / PLACE_GRID)
        if np.all(first <= last):
            x, y = PLACE_GRID * rng.integers(first, last + 1)
            return Placement(float(x), float(y), phase)


def _start_area(thing: Thing, phase: float) -> tuple[FloatArray, FloatArray]:
    """Return the least and the greatest column and row at which an object may start, ``[2]`` each."""
    margin = SIZES[thing.size] + 1
    low, high = np.full(2, margin), np.full(2, SIDE - margin)
    if thing.motion in ("left", "right"):
        low[0], high[0] = 0, SIDE - 1
    elif thing.motion in ("up", "down"):
        low[1], high[1] = 0, SIDE - 1
    elif thing.motion == "bouncing":
        lift = BOUNCE_HEIGHT * abs(math.sin(phase / 2))
        low[1], high[1] = low[1] + BOUNCE_HEIGHT - lift, high[1] - lift
    elif thing.motion == "circling":
        offset = CIRCLE_RADIUS * np.array([math.cos(phase), math.sin(phase)])
        low, high = low + CIRCLE_RADIUS + offset, high - CIRCLE_RADIUS + offset
    elif thing.motion == "pulsing":
        low, high = low + PULSE_DEPTH * margin, high - PULSE_DEPTH * margin
    return low, high


def draw_clip(rng: np.random.Generator, scene: Scene, frames: int, *, opening: bool = False) -> tuple[Segment, ...]:
    """Return a clip of one scene with placements of :func:`draw_placement`; advances ``rng``."""
    return (Segment(scene, frames, tuple(draw_placement(rng, thing, opening=opening) for thing in scene.things)),)


def switch(segment: Segment, scene: Scene, frames: int) -> Segment:
    """Return the segment that follows when the scene changes: objects go on from where they are.

    Raises:
        ValueError: If the scenes have different numbers of objects.
    """
    if len(scene.things) != len(segment.scene.things):
        raise ValueError("a switch keeps the number of objects")
    placements = []
    for before, after, start in zip(segment.scene.things, scene.things, segment.placements, strict=True):
        x, y, _ = (float(v) for v in path(before.motion, start, segment.frames + 1)[-1])
        phase = start.phase + 2 * math.pi * segment.frames / PERIOD_FRAMES
        phase = phase if after.motion == before.motion else 0.0
        placements.append(Placement(x % SIDE, y % SIDE, phase % (4 * math.pi)))
    return Segment(scene, frames, tuple(placements))


def change(rng: np.random.Generator, scene: Scene) -> Scene:
    """Return the scene with one attribute of its first object, or the background, drawn anew; never held out."""
    while True:
        attribute = str(rng.choice(["colour", "shape", "motion", "background", "all"]))
        other = draw_scene(rng)
        if attribute == "background":
            changed = replace(scene, background=other.background)
        elif attribute == "all":
            changed = Scene(other.background, (other.things[0], *scene.things[1:]))
        else:
            thing = replace(scene.things[0], **{attribute: getattr(other.things[0], attribute)})
            changed = replace(scene, things=(thing, *scene.things[1:]))
        colours = {thing.colour for thing in changed.things}
        if changed != scene and not changed.held_out and len(colours) == len(changed.things):
            return changed
