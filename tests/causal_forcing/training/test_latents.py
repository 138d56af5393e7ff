"""The clips of the data set: where they begin."""

import numpy as np
import pytest

from causal_forcing.training import latents, world


def starts(index, *, frames, motion):
    """Return where the objects of such a motion begin and where they are five frames later, both ``[N, 3]``."""
    shard = latents.Shard.of(3, index, frames=frames, two_objects=0.0)
    things = [clip.scenes[0].things[0] for clip in shard.clips]
    place = shard.pictures.frames(0, 5).place[:, :, 0].astype(np.float64)
    place[..., 2] /= np.array([world.SIZES[thing.size] for thing in things])[:, None]
    moving = [thing.motion == motion for thing in things]
    return place[moving, 0], place[moving, -1]


@pytest.mark.parametrize("motion", world.OPENING_PHASES)
def test_streams_begin_where_one_picture_tells_how_its_object_goes_on(motion):
    begin, end = starts(1, frames=16, motion=motion)
    assert len(begin) > 1
    np.testing.assert_allclose(end - begin, np.broadcast_to((end - begin)[0], begin.shape), atol=1e-4)
    first, _ = starts(0, frames=1, motion=motion)
    assert set(map(tuple, first.round(4))) >= set(map(tuple, begin.round(4)))
    begin, end = starts(2, frames=16, motion=motion)
    assert np.ptp(end - begin, axis=0).max() > 0.05
