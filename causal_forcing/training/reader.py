"""Reads a clip of the world back from its pixels, without learned parts.

Backgrounds are grey, so at every pixel ``max - min`` over the colour channels is proportional to how much of it an
object covers, and the direction ``(p - min) / (max - min)`` is the object's hue whatever the background. From that
follow area, centroid (on the torus), shape (overlap with drawn templates of the same area) and motion (the centroid
over time).
Every question can be answered with :data:`NONE`, which counts as wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from causal_forcing.training.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIDE,
    SIZES,
    SPEED,
    FloatArray,
    background,
    coverage,
)

NONE = "none"
"""The answer when nothing fits."""

MINIMUM_CHROMA = 0.12
MINIMUM_AREA = 30.0
"""Covered pixels below which there is no object."""

MINIMUM_OVERLAP = 0.72
"""Least overlap (soft intersection over union) with a shape's template."""

COLOUR_TOLERANCE = 0.22
"""Most distance in RGB (0 to 1 each) between an object's core and a palette colour."""

BACKGROUND_TOLERANCE = 0.10
"""Most mean absolute error against a background."""

SHAPE_EVERY = 4
"""Pixel frames between two readings of the shape."""

_GREYS = {name: background(name) for name in BACKGROUNDS}
_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], dtype=np.float32) / 255
_CHROMA = _PALETTE.max(1) - _PALETTE.min(1)
_HUES = (_PALETTE - _PALETTE.min(1, keepdims=True)) / _CHROMA[:, None]


@dataclass(frozen=True)
class ThingReading:
    """One object as read; every word may be :data:`NONE`.

    Attributes:
        colour: Name of its colour.
        shape: Name of its shape.
        size: Name of its size.
        motion: Name of its motion over the whole clip.
        track: ``[T, 2]`` column and row of its centroid in pixels.
        radius: ``[T]`` outer radius in pixels.
        area: Mean number of covered pixels.
    """

    colour: str
    shape: str
    size: str
    motion: str
    track: FloatArray
    radius: FloatArray
    area: float


@dataclass(frozen=True)
class ClipReading:
    """A clip as read.

    Attributes:
        background: Its name or :data:`NONE`.
        things: Objects by area, largest first.
    """

    background: str
    things: tuple[ThingReading, ...]


def read_clip(frames: NDArray[np.uint8]) -> ClipReading:
    """Return what is on the screen.

    Args:
        frames: ``[T, 64, 64, 3]`` uint8; the motion needs about 32 frames, one period.
    """
    pixels = (frames / 255).astype(np.float32)
    alphas = colour_layers(pixels)
    areas = alphas.sum((2, 3))
    present = [c for c in range(len(_NAMES)) if np.mean(areas[c] > MINIMUM_AREA) > 0.5]
    things = [_read_thing(pixels, alphas[c], _NAMES[c]) for c in present]
    return ClipReading(_read_background(pixels), tuple(sorted(things, key=lambda thing: -thing.area)))


def colour_layers(pixels: FloatArray) -> FloatArray:
    """Return how much of each pixel is covered by each palette colour.

    Args:
        pixels: ``[T, H, W, 3]`` in 0 to 1.

    Returns:
        ``[colours, T, H, W]`` float32; at most one colour a pixel.
    """
    low, chroma = pixels.min(-1), np.ptp(pixels, axis=-1)
    coloured = np.nonzero(chroma > MINIMUM_CHROMA)
    hue = (pixels[coloured] - low[coloured][:, None]) / chroma[coloured][:, None]
    nearest = np.abs(hue[:, None, :] - _HUES).sum(-1).argmin(-1)
    layers = np.zeros((len(_NAMES), *chroma.shape), dtype=np.float32)
    layers[(nearest, *coloured)] = (chroma[coloured] / _CHROMA[nearest]).clip(0, 1)
    return layers


def centroids(alpha: FloatArray) -> FloatArray:
    """Return the centroid ``[T, 2]`` (column, row) on the torus of covers ``[T, H, W]``."""
    angle = 2 * math.pi * (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    wave = np.exp(1j * angle)
    column, row = (alpha.sum(1) * wave).sum(1), (alpha.sum(2) * wave).sum(1)
    return (np.stack([np.angle(column), np.angle(row)], 1) / (2 * math.pi) * SIDE % SIDE).astype(np.float32)


def _read_thing(pixels: FloatArray, alpha: FloatArray, colour: str) -> ThingReading:
    track, area = centroids(alpha), alpha.sum((1, 2))
    kept = [t for t in range(0, len(alpha), SHAPE_EVERY) if area[t] > MINIMUM_AREA]
    shape = _majority([_read_shape(alpha[t], track[t]) for t in kept])
    radius = np.sqrt(area / _unit_area(shape if shape != NONE else "square"))
    mean_radius = float(np.median(radius))
    middle = sum(SIZES.values()) / 2
    size = NONE if not 0.7 * SIZES["small"] < mean_radius < 1.3 * SIZES["large"] else _size(mean_radius, middle)
    return ThingReading(
        colour if _core_matches(pixels, alpha, colour) else NONE,
        shape,
        size,
        read_motion(track, radius),
        track,
        radius.astype(np.float32),
        float(area.mean()),
    )


def _size(radius: float, middle: float) -> str:
    return "small" if radius < middle else "large"


def _core_matches(pixels: FloatArray, alpha: FloatArray, colour: str) -> bool:
    core = pixels[alpha > 0.85 * alpha.max()]
    return bool(np.linalg.norm(np.median(core, axis=0) - _PALETTE[_NAMES.index(colour)]) < COLOUR_TOLERANCE)


def _read_shape(alpha: FloatArray, centre: FloatArray) -> str:
    """Return the shape whose template of the same area and centroid overlaps most."""
    overlaps = {}
    for shape in SHAPES:
        template = _template(shape, centre, float(alpha.sum()))
        overlaps[shape] = float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= MINIMUM_OVERLAP else NONE


def _template(shape: str, centre: FloatArray, area: float) -> FloatArray:
    radius = math.sqrt(area / _unit_area(shape))
    offset = TRIANGLE_OFFSET * radius if shape == "triangle" else 0.0
    track = np.array([[centre[0], centre[1] - offset, 1.0]], dtype=np.float32)
    cover: FloatArray = coverage(shape, track, radius)[0]
    return cover


def _measure(shape: str) -> tuple[float, float]:
    cover = coverage(shape, np.array([[SIDE / 2, SIDE / 2, 1.0]], dtype=np.float32), 20.0)[0]
    rows = np.arange(SIDE) + 0.5 - SIDE / 2
    return float(cover.sum()) / 400, float((cover.sum(1) * rows).sum() / cover.sum()) / 20


_UNIT_AREAS = {shape: _measure(shape)[0] for shape in SHAPES}
TRIANGLE_OFFSET = _measure("triangle")[1]
"""How far the centroid of a triangle lies below its centre, in outer radii."""


def _unit_area(shape: str) -> float:
    return _UNIT_AREAS[shape]


def read_motion(track: FloatArray, radius: FloatArray) -> str:
    """Return the motion of an object.

    Args:
        track: ``[T, 2]`` centroid on the torus.
        radius: ``[T]`` in pixels.
    """
    if len(track) < 8:
        return NONE
    steps = (np.diff(track, axis=0) + SIDE / 2) % SIDE - SIDE / 2
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    speed = steps.mean(0)
    straight = np.abs(path - speed * np.arange(len(path))[:, None]).max() < 6
    along, across = (0, 1) if abs(speed[0]) > abs(speed[1]) else (1, 0)
    if straight and 0.6 * SPEED < abs(speed[along]) < 1.5 * SPEED and abs(speed[across]) < 0.25 * SPEED:
        names = (("left", "right"), ("up", "down"))[along]
        return names[int(speed[along] > 0)]
    low, high = np.percentile(path, 3, axis=0), np.percentile(path, 97, axis=0)
    width, height = high - low
    pulse = float(np.percentile(radius, 97) - np.percentile(radius, 3)) / float(np.median(radius) + 1e-6)
    if max(width, height) < 5:
        return "pulsing" if pulse > 0.25 else ("still" if pulse < 0.15 and max(width, height) < 3.5 else NONE)
    if width < 6 and height > 11:
        return "bouncing"
    return "circling" if min(width, height) > 13 and max(width, height) < 40 else NONE


def _read_background(pixels: FloatArray) -> str:
    answers = []
    for frame in pixels[::SHAPE_EVERY]:
        chroma = frame.max(-1) - frame.min(-1)
        covered = _dilate(chroma > MINIMUM_CHROMA)
        if covered.mean() > 0.9:
            answers.append(NONE)
            continue
        grey = frame.mean(-1)[~covered]
        errors = {name: float(np.abs(grey - _GREYS[name][~covered]).mean()) for name in BACKGROUNDS}
        best = min(errors, key=lambda name: errors[name])
        answers.append(best if errors[best] < BACKGROUND_TOLERANCE else NONE)
    return _majority(answers)


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = mask.copy()
    for axis in (0, 1):
        for shift in (-2, -1, 1, 2):
            grown |= np.roll(mask, shift, axis)
    return grown


def _majority(answers: Sequence[str]) -> str:
    """Return the answer given by at least 60 %, or :data:`NONE`."""
    if not answers:
        return NONE
    answer, count = Counter(answers).most_common(1)[0]
    return answer if count >= 0.6 * len(answers) else NONE
