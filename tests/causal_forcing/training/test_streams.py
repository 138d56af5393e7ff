"""Where the object of a long stream is, and where the world would have it."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from causal_forcing.training import streams, world

FIRST, LENGTH = 97, 60


def shown(motion, shape="square", *, size="small", placement=None, off=(0.0, 0.0)):
    """Frames of a stream from ``FIRST`` on, its object some pixels off its path, and where it started."""
    thing = world.Thing("blue", shape, size, motion)
    scene = world.Scene("stripes", (thing,))
    rng = np.random.default_rng(1)
    start = placement or world.draw_placement(rng, thing, opening=True)
    there = world.Placement(start.x + off[0], start.y + off[1], start.phase)
    frames = world.render_segment(world.Segment(scene, FIRST + LENGTH, (there,)))[FIRST:]
    return thing, frames, start


def distance(found, wanted):
    """How many pixels, and how many radians, two starts are apart."""
    x, y = ((a - b + 32) % 64 - 32 for a, b in ((found.x, wanted.x), (found.y, wanted.y)))
    phase = (found.phase - wanted.phase + math.pi) % (2 * math.pi) - math.pi
    return math.hypot(x, y), abs(phase)


@pytest.mark.parametrize("shape", ["ring", "triangle"])
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("motion", world.MOTIONS)
def test_an_object_near_a_path_that_streams_have_is_on_it(motion, size, shape):
    thing, frames, start = shown(motion, shape, size=size, off=(1.2, -1.5))
    place, phase = distance(streams.seen(thing, frames, FIRST), start)
    assert place == pytest.approx(0, abs=1e-4)
    assert motion in ("left", "right", "up", "down", "still") or phase == 0


@pytest.mark.parametrize("motion", ["bouncing", "circling", "pulsing"])
def test_an_object_at_another_phase_goes_on_from_there(motion):
    placement = world.Placement(37.0, 35.0, 2.5)
    thing, frames, start = shown(motion, placement=placement)
    place, phase = distance(streams.seen(thing, frames, FIRST), start)
    assert place < 1
    assert phase < 2 * math.pi / streams.PHASES


@pytest.mark.parametrize("motion", ["right", "circling"])
def test_an_object_between_the_paths_that_streams_have_does_not_jump(motion):
    thing, frames, start = shown(motion, off=(7.0, 4.0))
    place, _ = distance(streams.seen(thing, frames, FIRST), start)
    assert place == pytest.approx(math.hypot(7, 4), abs=0.3)


def test_another_shape_is_no_matter():
    _, frames, start = shown("circling", "circle")
    asked = world.Thing("blue", "cross", "small", "circling")
    assert distance(streams.seen(asked, frames, FIRST), start) == (pytest.approx(0, abs=1e-4), 0)


@pytest.mark.parametrize("asked", [("red", "right"), ("blue", "left"), ("blue", "circling")])
def test_what_is_not_there_or_moves_otherwise_is_nowhere(asked):
    colour, motion = asked
    _, frames, _ = shown("right")
    assert streams.seen(world.Thing(colour, "square", "small", motion), frames, FIRST) is None


def test_an_object_seen_in_half_of_the_frames_is_seen():
    thing, frames, start = shown("down")
    background = world.render_segment(world.Segment(world.Scene("stripes", ()), 1, ()))
    frames[: LENGTH // 2] = background
    assert distance(streams.seen(thing, frames, FIRST), start)[0] < 1e-4
    frames[: LENGTH // 2 + 1] = background
    assert streams.seen(thing, frames, FIRST) is None


def test_half_of_the_stretches_that_are_kept_are_the_most_wrong_ones():
    scene = world.Scene("stripes", (world.Thing("blue", "square", "small", "still"),))
    segment = world.Segment(scene, 1, (world.Placement(0, 0, 0),))
    found = [streams.Stretch(scene, torch.zeros(1), segment, float(index * 7 % 20)) for index in range(20)]
    kept = [stretch.wrong for stretch in streams.kept(found, 8, np.random.default_rng(1))]
    assert kept[:4] == [19, 18, 17, 16]
    assert len(set(kept)) == 8
    others = {tuple(s.wrong for s in streams.kept(found, 8, np.random.default_rng(seed))[4:]) for seed in range(5)}
    assert len(others) == 5
    assert {stretch.wrong for stretch in streams.kept(found[:6], 8, np.random.default_rng(1))} == {
        stretch.wrong for stretch in found[:6]
    }


@pytest.mark.parametrize("size", ["small", "large"])
def test_how_wrong_a_stretch_is_does_not_depend_on_the_size(size, monkeypatch):
    thing = world.Thing("blue", "square", size, "right")
    start = world.draw_placement(np.random.default_rng(1), thing, opening=True)
    pixels = {}
    for shape in ("square", "circle"):
        scene = world.Scene("black", (dataclasses.replace(thing, shape=shape),))
        pixels[shape] = world.render_segment(world.Segment(scene, 4 * 46, (start,)))

    def decode(_engine, latents):
        firsts = latents[:, 0, 0, 0, 0].int().tolist()  # the second of two stretches has lost its shape
        return [pixels["square" if at < 20 else "circle"][4 * at : 4 * (at + latents.shape[2]) - 3] for at in firsts]

    monkeypatch.setattr(streams, "decode", decode)
    stream = torch.arange(46.0).view(1, 46, 1, 1).expand(16, 46, 8, 8)
    found = list(streams.stretches(None, world.Scene("black", (thing,)), stream))
    assert [stretch.went[0, :, 0, 0].tolist() for stretch in found] == [[0, *range(16, 31)], [0, *range(31, 46)]]
    assert [stretch.wrong for stretch in found] == [pytest.approx(0, abs=0.01), pytest.approx(1.9, rel=0.2)]
