"""What a worn stretch shows, and what it should."""

from collections import Counter

import numpy as np

from causal_forcing.training import streams, world, worn


def test_a_worn_object_is_where_it_should_be_and_nothing_is_held_out():
    rng = np.random.default_rng(1)
    drawn = [worn.draw(rng) for _ in range(400)]
    assert not any(segment.scene.held_out for one in drawn for segment in (one.right, one.wrong))
    for one in drawn:
        assert one.right.placements == one.wrong.placements
        assert one.right.scene == one.scene == one.sink.scene
        assert one.right.frames == one.wrong.frames == 4 * 20 - 3
        assert one.sink.frames == 1


def test_objects_wear_off_to_another_shape_circles_most_often_or_come_to_rest():
    rng = np.random.default_rng(2)
    drawn = [worn.draw(rng) for _ in range(800)]
    pairs = [(one.right.scene.things[0], one.wrong.scene.things[0]) for one in drawn]
    kinds = Counter("shape" if right.shape != wrong.shape else wrong.motion for right, wrong in pairs)
    assert set(kinds) == {"shape", "still"}
    for right, wrong in pairs:
        assert (right.colour, right.size) == (wrong.colour, wrong.size)
        assert right.motion == wrong.motion or (right.motion, wrong.motion) == ("pulsing", "still")
    rounded = [wrong.shape == "circle" for right, wrong in pairs if "circle" != right.shape != wrong.shape]
    assert 0.5 < np.mean(rounded) < 0.75


def test_a_stretch_is_somewhere_in_a_stream_that_began_where_its_sink_shows():
    rng = np.random.default_rng(3)
    for _ in range(20):
        one = worn.draw(rng)
        thing, start = one.scene.things[0], one.sink.placements[0]
        frames = 4 * 15 * (streams.STRETCHES + 1)
        path = world.path(thing.motion, start, frames)
        here = world.path(thing.motion, one.right.placements[0], 8)
        off = (path[None, :, :2] - here[:1, None, :2] + world.SIDE / 2) % world.SIDE - world.SIDE / 2
        assert np.abs(off).sum(-1).min() < 0.01
