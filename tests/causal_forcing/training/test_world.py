"""The world is deterministic, endless and readable."""

import hashlib

import numpy as np
import pytest

from causal_forcing.training import captions, world
from causal_forcing.training.evaluation import READ_FRAMES, blurred, describe, expectation
from causal_forcing.training.reader import NONE, read_clip, read_motion


def clip_hash(seed):
    rng = np.random.default_rng(seed)
    digest = hashlib.sha256()
    for _ in range(4):
        scene = world.draw_scene(rng, two_objects=0.5)
        digest.update(world.render(world.draw_clip(rng, scene, 9)).tobytes())
        digest.update(captions.caption(scene, rng).encode())
    return digest.hexdigest()


def test_the_same_seed_gives_the_same_world():
    assert clip_hash(1) == clip_hash(1)
    assert clip_hash(1) != clip_hash(2)


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_motions_are_endless(motion):
    start = world.Placement(20.0, 30.0, 1.0)
    track = world.path(motion, start, 2 * world.PERIOD_FRAMES + 1)
    first, later = track[: world.PERIOD_FRAMES + 1], track[world.PERIOD_FRAMES :]
    np.testing.assert_allclose((first - later + 32)[:, :2] % 64, 32, atol=1e-3)
    np.testing.assert_allclose(first[:, 2], later[:, 2], atol=1e-5)


@pytest.mark.parametrize("motion", ["bouncing", "circling", "left", "still"])
def test_objects_go_on_from_where_they_are_when_the_scene_changes(motion):
    before = world.Scene("black", (world.Thing("red", "circle", "small", "up"),))
    after = world.Scene("black", (world.Thing("blue", "circle", "small", motion),))
    first = world.Segment(before, 9, (world.Placement(30.0, 40.0, 0.5),))
    second = world.switch(first, after, 9)
    end = world.path("up", first.placements[0], 10)[-1]
    start = world.path(motion, second.placements[0], 1)[0]
    np.testing.assert_allclose(start[:2], end[:2], atol=1e-4)


def test_one_combination_in_eight_is_held_out_and_never_drawn():
    rng = np.random.default_rng(0)
    assert not any(world.draw_scene(rng, two_objects=0.5).held_out for _ in range(200))
    scene = world.draw_scene(rng)
    assert not any(world.change(rng, scene).held_out for _ in range(100))
    held_out = list(captions.held_out_scenes())
    assert len(held_out) == 400
    assert all(scene.held_out for scene in held_out)


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_the_reader_reads_what_was_drawn(blur):
    rng = np.random.default_rng(3)
    for motion in world.MOTIONS:
        for _ in range(2):
            drawn = world.draw_scene(rng)
            thing = world.Thing(drawn.things[0].colour, drawn.things[0].shape, drawn.things[0].size, motion)
            scene = world.Scene(drawn.background, (thing,))
            clip = world.render(world.draw_clip(rng, scene, READ_FRAMES))
            assert describe(read_clip(blurred(clip, blur) if blur else clip)) == expectation(scene)


def test_the_reader_says_none_to_noise_and_to_what_is_not_of_this_world():
    noise = np.random.default_rng(0).integers(0, 256, (READ_FRAMES, 64, 64, 3), dtype=np.uint8)
    words = describe(read_clip(noise))
    assert words["shape"] == words["background"] == words["motion"] == NONE
    empty = np.full((READ_FRAMES, 64, 64, 3), 15, dtype=np.uint8)
    assert describe(read_clip(empty)) == dict.fromkeys(words, NONE) | {"background": "black"}
    # A brown object has a hue of the palette (orange) but not its lightness.
    scene = world.Scene("black", (world.Thing("orange", "circle", "large", "still"),))
    clip = world.render(world.draw_clip(np.random.default_rng(1), scene, READ_FRAMES))
    assert describe(read_clip((clip * 0.55).astype(np.uint8)))["colour"] == NONE


def test_a_jump_is_not_a_motion():
    rng = np.random.default_rng(0)
    track = rng.uniform(0, 64, (READ_FRAMES, 2))
    assert read_motion(track, np.full(READ_FRAMES, 9.0)) == NONE


def test_captions_name_their_scene():
    rng = np.random.default_rng(5)
    for _ in range(50):
        scene = world.draw_scene(rng, two_objects=0.3)
        size_omitted = float(rng.integers(2))
        text = captions.caption(scene, rng, size_omitted=size_omitted).lower()
        for thing in scene.things:
            assert any(word in text.split() for word in captions.SIZE_WORDS[thing.size]) == (not size_omitted)
            assert any(word in text for word in captions.COLOUR_WORDS[thing.colour])
            assert any(word in text for word in captions.SHAPE_WORDS[thing.shape])
            assert any(phrase in text for phrase in captions.MOTION_WORDS[thing.motion])
        assert any(phrase.lower() in text for phrase in captions.BACKGROUND_WORDS[scene.background])


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_objects_begin_on_the_grid_and_stay_on_the_screen_unless_they_travel(motion):
    rng = np.random.default_rng(3)
    for _ in range(50):
        thing = world.Thing("red", "circle", str(rng.choice(list(world.SIZES))), motion)
        start = world.draw_placement(rng, thing)
        assert start.x % world.PLACE_GRID == start.y % world.PLACE_GRID == 0
        track = world.path(motion, start, world.PERIOD_FRAMES)
        reach = world.SIZES[thing.size] * track[:, 2]
        across, along = track[:, 0], track[:, 1]
        if motion not in ("left", "right"):
            assert np.all((across - reach >= 0) & (across + reach <= world.SIDE))
        if motion not in ("up", "down"):
            assert np.all((along - reach >= 0) & (along + reach <= world.SIDE))
