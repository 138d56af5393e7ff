"""Frame codecs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from causal_forcing.errors import InvalidRequest
from serve.codecs.frames import Codec, FrameFormat, Pixels, decode_frame, new_encoder, split

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
SMOOTH = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)


def encode(pixels: Pixels, *fields: Any, min_bytes: int = 0) -> bytes:
    height, width = pixels.shape[:2]
    return new_encoder(FrameFormat(*fields), height, width, min_bytes).encode(pixels, 0, keyframe=False).data


@pytest.mark.parametrize("codec", [Codec.PNG, Codec.RAW_RGB24])
def test_lossless_codecs_give_the_same_bits_back(codec: Codec) -> None:
    assert np.array_equal(decode_frame(codec, encode(PIXELS, codec), 32, 48), PIXELS)


def test_jpeg_is_close_and_its_quality_matters() -> None:
    good, bad = (encode(SMOOTH, Codec.JPEG, quality) for quality in (95, 10))
    assert len(bad) < len(good)
    error = np.abs(decode_frame(Codec.JPEG, good, 32, 48).astype(int) - SMOOTH)
    assert error.mean() < 4


def test_padding_does_not_change_the_picture() -> None:
    padded = encode(SMOOTH, min_bytes=60_000)
    assert len(padded) == 60_000
    assert np.array_equal(decode_frame(Codec.JPEG, padded, 32, 48), decode_frame(Codec.JPEG, encode(SMOOTH), 32, 48))


def test_a_frame_of_another_size_is_noticed() -> None:
    with pytest.raises(ValueError, match="a frame of 32x48 came where 64x48"):
        decode_frame(Codec.PNG, encode(PIXELS, Codec.PNG), 64, 48)
    with pytest.raises(ValueError, match="are not a 64x48 frame"):
        decode_frame(Codec.RAW_RGB24, PIXELS.tobytes(), 64, 48)


@pytest.mark.parametrize(("codec", "quality"), [(Codec.JPEG, 0), (Codec.JPEG, 101), (Codec.PNG, 90)])
def test_a_quality_that_is_out_of_range_or_without_effect_is_refused(codec: Codec, quality: int) -> None:
    with pytest.raises(InvalidRequest, match="jpeg_quality"):
        FrameFormat(codec, quality)


@pytest.mark.parametrize(("size", "parts"), [(0, [0]), (1, [1]), (10, [10]), (11, [10, 1]), (30, [10, 10, 10])])
def test_parts_join_to_the_whole(size: int, parts: list[int]) -> None:
    data = bytes(range(size))
    pieces = split(data, 10)
    assert [len(piece) for piece in pieces] == parts
    assert b"".join(pieces) == data
