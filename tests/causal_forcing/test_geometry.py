"""Sizes: what 8, 4 and 2 make of a frame."""

import pytest

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import Geometry, pixel_frames


def test_the_native_size():
    geometry = Geometry(480, 832)
    assert (geometry.latent_height, geometry.latent_width) == (60, 104)
    assert (geometry.grid_height, geometry.grid_width, geometry.tokens_per_frame) == (30, 52, 1560)
    assert geometry.latent_shape(3) == (1, 16, 3, 60, 104)


@pytest.mark.parametrize("value", [0, -16, 8, 100, 481, 16.0, "480", True, None])
@pytest.mark.parametrize("field", ["height", "width"])
def test_other_sizes_are_refused_by_name(field, value):
    sizes = {"height": 480, "width": 832} | {field: value}
    with pytest.raises(InvalidRequest, match=f"{field}: got {value!r}; must be a positive multiple of 16") as caught:
        Geometry(**sizes)
    assert caught.value.reason == "UNSUPPORTED_RESOLUTION"


def test_the_first_latent_is_one_pixel_frame_and_every_other_four():
    assert [pixel_frames(n, first=True) for n in range(5)] == [0, 1, 5, 9, 13]
    assert [pixel_frames(n, first=False) for n in range(5)] == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("first", [True, False])
def test_any_split_of_a_stream_has_the_same_pixel_frames(first):
    for a in range(1, 6):
        for b in range(6):
            whole = pixel_frames(a + b, first=first)
            assert whole == pixel_frames(a, first=first) + pixel_frames(b, first=False)
