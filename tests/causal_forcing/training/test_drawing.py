"""Drawing many clips at once gives the pixels of drawing them one by one."""

import numpy as np
import pytest
import torch

from causal_forcing.training import drawing, world


def test_a_batch_is_what_the_world_renders():
    rng = np.random.default_rng(0)
    clips = []
    for _ in range(8):
        scene = world.draw_scene(rng, two_objects=0.5)
        (first,) = world.draw_clip(rng, scene, 5)
        clips.append((first, world.switch(first, world.change(rng, scene), 4)))
    drawn = drawing.draw(drawing.Pictures.of(clips)).numpy()
    rendered = np.stack([world.render(clip) for clip in clips])
    assert np.abs(drawn.astype(int) - rendered).max() <= 1


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_random_pictures_move_as_the_world_does(motion):
    index = np.full((3, 1), world.MOTIONS.index(motion))
    track = drawing._paths(np.random.default_rng(0), index, 9)[:, :, 0]
    for clip in track:
        start = clip[0]
        steps = np.diff(clip, axis=0)
        phase_free = motion in ("left", "right", "up", "down", "still")
        if phase_free:
            wanted = world.path(motion, world.Placement(float(start[0]), float(start[1]), 0.0), 9)
            np.testing.assert_allclose(clip, wanted, atol=1e-4)
        else:
            assert np.abs(steps).max() > 0.01


def test_pictures_change_where_they_are_told_to():
    rng = np.random.default_rng(1)
    first, second = (drawing.random_pictures(rng, 2, 9, (1, 2)) for _ in range(2))
    joined = drawing.draw(first.then(second, np.array([5, 9])))
    assert torch.equal(joined[0, :5], drawing.draw(first)[0, :5])
    assert torch.equal(joined[0, 5:], drawing.draw(second)[0, 5:])
    assert torch.equal(joined[1], drawing.draw(first)[1])
