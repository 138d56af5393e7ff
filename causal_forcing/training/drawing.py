"""Draws many clips of the world at once, on any device: the same pixels as :mod:`causal_forcing.training.world`.

A batch of clips is a few arrays (:class:`Pictures`): which background, shape, colour and radius at every frame, and
where. They are drawn or computed on the host in numpy, so they do not depend on the device; only the pixels are made
there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from causal_forcing.training import world

_COLOURS = list(world.COLOURS)
_SIZES = np.array(list(world.SIZES.values()), dtype=np.float32)
_HOST_CLIPS_PIXELS = 64 * 1024 * 1024
"""Most pixels times objects that are drawn together, so that a large batch does not fill the memory."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """A batch of clips before they are drawn: ``N`` clips of ``T`` frames with up to ``K`` objects.

    Attributes:
        background: ``[N, T]``, index into :data:`world.BACKGROUNDS`.
        colour: ``[N, T, K]``, index into :data:`world.COLOURS`.
        shape: ``[N, T, K]``, index into :data:`world.SHAPES`.
        place: ``[N, T, K, 3]`` float32: column, row, and radius in pixels; radius 0 for no object.
    """

    background: Indices
    colour: Indices
    shape: Indices
    place: world.FloatArray

    @classmethod
    def of(cls, clips: Sequence[Sequence[world.Segment]]) -> Pictures:
        """Return clips of equal length as arrays."""
        frames = sum(segment.frames for segment in clips[0])
        objects = max(len(segment.scene.things) for clip in clips for segment in clip)
        shape = (len(clips), frames)
        made = cls(
            np.zeros(shape, dtype=np.int64),
            np.zeros((*shape, objects), dtype=np.int64),
            np.zeros((*shape, objects), dtype=np.int64),
            np.zeros((*shape, objects, 3), dtype=np.float32),
        )
        for index, clip in enumerate(clips):
            start = 0
            for segment in clip:
                made._fill(index, slice(start, start + segment.frames), segment)
                start += segment.frames
        return made

    def _fill(self, clip: int, at: slice, segment: world.Segment) -> None:
        self.background[clip, at] = world.BACKGROUNDS.index(segment.scene.background)
        for k, (thing, start) in enumerate(zip(segment.scene.things, segment.placements, strict=True)):
            track = world.path(thing.motion, start, segment.frames)
            track[:, 2] *= np.float32(world.SIZES[thing.size])
            self.colour[clip, at, k] = _COLOURS.index(thing.colour)
            self.shape[clip, at, k] = world.SHAPES.index(thing.shape)
            self.place[clip, at, k] = track

    def frames(self, first: int, last: int) -> Pictures:
        """Return a stretch of every clip."""
        at = (slice(None), slice(first, last))
        return Pictures(self.background[at], self.colour[at], self.shape[at], self.place[at])

    def then(self, other: Pictures, changes: Indices) -> Pictures:
        """Return these clips, each followed by the other's from a frame on.

        Args:
            other: Clips of the same shape.
            changes: ``[N]``: the first frame that is the other's; the clip's length for none.
        """
        own = np.arange(self.background.shape[1])[None] < changes[:, None]
        return Pictures(
            np.where(own, self.background, other.background),
            np.where(own[..., None], self.colour, other.colour),
            np.where(own[..., None], self.shape, other.shape),
            np.where(own[..., None, None], self.place, other.place),
        )


def random_pictures(rng: np.random.Generator, clips: int, frames: int, objects: tuple[int, int]) -> Pictures:
    """Return random clips that hold nothing held out; objects start anywhere on the torus.

    Args:
        rng: Source of randomness; advanced.
        clips: How many clips.
        frames: Pixel frames of each.
        objects: Fewest and most objects of a clip.
    """
    most = objects[1]
    shape = (clips, most)
    colour, form = rng.integers(len(_COLOURS), size=shape), rng.integers(len(world.SHAPES), size=shape)
    size, motion = rng.integers(len(_SIZES), size=shape), rng.integers(len(world.MOTIONS), size=shape)
    motion = (motion + ((colour + 3 * form + 5 * motion) % len(_COLOURS) == 0)) % len(world.MOTIONS)
    count = rng.integers(objects[0], most + 1, size=clips)
    radius = _SIZES[size] * (np.arange(most)[None] < count[:, None])
    place = _paths(rng, motion, frames)
    place[..., 2] *= radius[:, None]

    def over_time(values: Indices) -> Indices:
        return np.broadcast_to(values[:, None], (clips, frames, most))

    background = np.broadcast_to(rng.integers(len(world.BACKGROUNDS), size=clips)[:, None], (clips, frames))
    return Pictures(background, over_time(colour), over_time(form), place)


def _paths(rng: np.random.Generator, motion: Indices, frames: int) -> world.FloatArray:
    """Return column, row and size factor ``[N, T, K, 3]`` of objects with random starts, as :func:`world.path`."""
    time = np.arange(frames)[None, :, None]
    start = rng.uniform(0, world.SIDE, size=(*motion.shape, 2))
    phase = rng.uniform(0, 2 * math.pi, size=motion.shape)[:, None]
    x, y = (np.repeat(start[:, None, :, axis], frames, 1) for axis in (0, 1))
    angle = phase + 2 * math.pi * time / world.PERIOD_FRAMES

    def are(name: str) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = motion[:, None] == world.MOTIONS.index(name)
        return found

    x = x + world.SPEED * time * (are("right").astype(float) - are("left"))
    y = y + world.SPEED * time * (are("down").astype(float) - are("up"))
    y = y - are("bouncing") * world.BOUNCE_HEIGHT * (np.abs(np.sin(angle / 2)) - np.abs(np.sin(phase / 2)))
    x = x + are("circling") * world.CIRCLE_RADIUS * (np.cos(angle) - np.cos(phase))
    y = y + are("circling") * world.CIRCLE_RADIUS * (np.sin(angle) - np.sin(phase))
    scale = 1 + are("pulsing") * world.PULSE_DEPTH * np.sin(angle)
    return np.stack([x, y, scale], axis=-1).astype(np.float32)


@torch.no_grad()
def draw(pictures: Pictures, device: torch.device | str = "cpu") -> Tensor:
    """Return the pixels ``[N, T, 64, 64, 3]`` uint8 of clips, equal to :func:`world.render`'s but for rounding."""
    clips, frames, objects = pictures.colour.shape
    step = max(1, _HOST_CLIPS_PIXELS // (frames * world.SIDE**2 * objects))
    parts = [
        _draw(
            torch.from_numpy(np.ascontiguousarray(pictures.background[i : i + step])).to(device).flatten(0, 1),
            *(
                torch.from_numpy(np.ascontiguousarray(part[i : i + step])).to(device).flatten(0, 1)
                for part in (pictures.colour, pictures.shape, pictures.place)
            ),
        )
        for i in range(0, clips, step)
    ]
    pixels = torch.cat(parts)
    return pixels.view(clips, frames, *pixels.shape[1:])


def _draw(background: Tensor, colour: Tensor, shape: Tensor, place: Tensor) -> Tensor:
    """Draw frames: background ``[M]``, colour and shape ``[M, K]``, place ``[M, K, 3]`` to ``[M, 64, 64, 3]``."""
    device = place.device
    greys = torch.from_numpy(np.stack([world.background(name) for name in world.BACKGROUNDS])).to(device)
    palette = torch.tensor(list(world.COLOURS.values()), dtype=torch.float32, device=device) / 255
    frame = greys[background][..., None].expand(-1, -1, -1, 3)
    for k in range(place.shape[1]):
        cover = _cover(shape[:, k], place[:, k])[..., None]
        frame = frame * (1 - cover) + cover * palette[colour[:, k]][:, None, None]
    return (frame * 255 + 0.5).to(torch.uint8)


def _cover(shape: Tensor, place: Tensor) -> Tensor:
    """Return how much of each pixel one object a frame covers, ``[M, 64, 64]``, as :func:`world.coverage`."""
    side = world.SIDE
    grid = torch.arange(side, dtype=torch.float32, device=place.device) + 0.5
    x, y, radius = place[:, :, None, None].unbind(1)
    dx = torch.remainder(grid[None, None, :] - x + side / 2, side) - side / 2
    dy = torch.remainder(grid[None, :, None] - y + side / 2, side) - side / 2
    round_ = torch.hypot(dx, dy)
    wide, tall = dx.abs(), dy.abs()
    centred = dy - 0.17 * radius
    distances = {
        "circle": lambda: round_ - radius,
        "ring": lambda: (round_ - 0.74 * radius).abs() - 0.26 * radius,
        "square": lambda: torch.maximum(wide, tall) - 0.88 * radius,
        "cross": lambda: torch.minimum(
            torch.maximum(wide - 0.32 * radius, tall - radius), torch.maximum(wide - radius, tall - 0.32 * radius)
        ),
        "triangle": lambda: torch.maximum(math.sqrt(3) / 2 * wide - 0.5 * centred, centred) - 0.58 * radius,
    }
    distance = torch.empty_like(round_)
    for index, name in enumerate(world.SHAPES):
        distance = torch.where((shape == index)[:, None, None], distances[name](), distance)
    return (0.5 - distance).clamp(0, 1) * (radius > 0)
