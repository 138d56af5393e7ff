"""H.264: one frame in, one frame out, decodable from every keyframe, in both containers."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from serve.codecs import fmp4
from serve.codecs.frames import Codec, EncodedFrame, FrameFormat, Pixels, new_encoder

HEIGHT, WIDTH = 64, 96
BOTH = [Codec.H264_ANNEXB, Codec.H264_FMP4]


def picture(number: int) -> Pixels:
    """Return a smooth picture whose brightness tells its number."""
    ramp = np.linspace(0, 40, WIDTH)[None, :, None] + np.linspace(0, 20, HEIGHT)[:, None, None]
    return np.broadcast_to(ramp + 5 * number, (HEIGHT, WIDTH, 3)).astype(np.uint8)


def encode(codec: Codec, numbers: range, keyframes: tuple[int, ...] = (), **fields: int) -> list[EncodedFrame]:
    encoder = new_encoder(FrameFormat(codec, **fields), HEIGHT, WIDTH)
    return [encoder.encode(picture(n), n, keyframe=n in keyframes) for n in numbers]


def join(frames: list[EncodedFrame]) -> bytes:
    return b"".join(frame.init_segment + frame.data for frame in frames)


def decode(stream: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(stream)) as container:
        return list(container.decode(video=0))


def check_pictures(pictures: list[av.VideoFrame], numbers: range) -> None:
    assert len(pictures) == len(numbers)
    for decoded, number in zip(pictures, numbers, strict=True):
        assert abs(decoded.to_ndarray(format="rgb24").astype(int) - picture(number)).mean() < 4


@pytest.mark.parametrize("codec", BOTH)
def test_frames_come_one_by_one_and_decode_to_the_same_pictures(codec: Codec) -> None:
    frames = encode(codec, range(20))
    assert [frame.keyframe for frame in frames] == [True] + [False] * 19
    check_pictures(decode(join(frames)), range(20))


@pytest.mark.parametrize("codec", BOTH)
def test_keyframes_come_at_the_interval_and_when_asked_for(codec: Codec) -> None:
    frames = encode(codec, range(20), keyframes=(5,), h264_keyframe_interval_frames=8)
    assert [n for n, frame in enumerate(frames) if frame.keyframe] == [0, 5, 13]


def test_an_annexb_stream_can_be_entered_at_every_keyframe() -> None:
    frames = encode(Codec.H264_ANNEXB, range(12), keyframes=(6,))
    assert all(frame.data.startswith(b"\x00\x00\x00\x01") for frame in frames)
    check_pictures(decode(join(frames[6:])), range(6, 12))


def test_a_fragmented_stream_can_be_entered_at_every_keyframe_and_keeps_its_time() -> None:
    frames = encode(Codec.H264_FMP4, range(12), keyframes=(6,), frames_per_second=24)
    assert [bool(frame.init_segment) for frame in frames] == [True] + [False] * 11
    entered = decode(frames[0].init_segment + join(frames[6:]))
    check_pictures(entered, range(6, 12))
    assert [round(float(p.pts * p.time_base * 24)) for p in entered] == list(range(6, 12))


def test_the_time_of_a_fragmented_stream_jumps_with_the_frame_numbers() -> None:
    encoder = new_encoder(FrameFormat(Codec.H264_FMP4), HEIGHT, WIDTH)
    numbers = [0, 1, 2, 40, 41]
    frames = [encoder.encode(picture(n % 8), n, keyframe=n == 40) for n in numbers]
    times = [Fraction(p.pts) * p.time_base * 16 for p in decode(join(frames))]
    assert times == numbers


def test_a_fresh_encoder_in_the_middle_of_a_file_does_not_disturb_a_player() -> None:
    frames = encode(Codec.H264_FMP4, range(6)) + encode(Codec.H264_FMP4, range(6, 12))
    assert frames[6].keyframe
    assert frames[6].init_segment == frames[0].init_segment
    check_pictures(decode(join(frames)), range(12))


def test_the_bit_rate_is_kept() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, HEIGHT, WIDTH, 3), dtype=np.uint8)
    sizes = []
    for rate in (100_000, 400_000):
        encoder = new_encoder(FrameFormat(Codec.H264_ANNEXB, h264_bit_rate=rate), HEIGHT, WIDTH)
        sizes.append(sum(len(encoder.encode(frame, n, keyframe=False).data) for n, frame in enumerate(noise)))
    assert sizes[0] < 0.6 * sizes[1]


def test_nal_units_are_found_between_both_kinds_of_start_code() -> None:
    stream = b"\x00\x00\x00\x01\x67ab\x00\x00\x01\x68c\x00\x00\x00\x01\x65d"
    assert fmp4.split_nals(stream) == [b"\x67ab", b"\x68c", b"\x65d"]
    assert [fmp4.nal_type(nal) for nal in fmp4.split_nals(stream)] == [7, 8, 5]
