"""H.264 goes to a file as it came; pictures are encoded anew."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from causal_forcing.errors import InvalidRequest
from serve.client import Frame
from serve.codecs import fmp4
from serve.codecs.frames import Codec, FrameFormat, new_encoder
from serve.commands.recording import open_recorder
from tests.serve.codecs.test_h264 import HEIGHT, WIDTH, check_pictures, picture

FPS = 24
NUMBERS = [*range(6), *range(10, 16)]
"""Frames 6 to 9 were dropped, so 10 is a keyframe."""


def frames(codec: Codec) -> list[Frame]:
    encoder = new_encoder(FrameFormat(codec, frames_per_second=FPS), HEIGHT, WIDTH)
    encoded = [(n, encoder.encode(picture(n), n, keyframe=n == 10)) for n in NUMBERS]
    return [
        Frame(n // 4, n, "p", e.data, codec.value, HEIGHT, WIDTH, None, e.keyframe, e.init_segment) for n, e in encoded
    ]


def record(path: Path, codec: Codec) -> list[Frame]:
    recorder = open_recorder(path, codec.value, FPS)
    recorder.metadata["comment"] = "a comment"
    sent = frames(codec)
    for frame in sent:
        recorder.take(frame)
    assert recorder.frame_count == len(sent)
    assert not path.exists()
    recorder.close()
    return sent


@pytest.mark.parametrize("codec", [Codec.H264_ANNEXB, Codec.H264_FMP4])
def test_h264_in_mp4_keeps_its_pictures_and_their_times(tmp_path: Path, codec: Codec) -> None:
    path = tmp_path / "out.mp4"
    record(path, codec)
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    assert [round(float(p.pts * p.time_base * FPS)) for p in pictures] == NUMBERS
    check_pictures(pictures[:6], range(6))
    check_pictures(pictures[6:], range(10, 16))
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_encoded_again_for_mp4(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    sent = record(path, Codec.H264_ANNEXB)
    with av.open(str(path)) as container:
        assert container.metadata["comment"] == "a comment"
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [packet.is_keyframe for packet in packets] == [frame.keyframe for frame in sent]
        for packet, frame in zip(packets, sent, strict=True):
            slices = [nal for nal in fmp4.split_nals(frame.data) if fmp4.nal_type(nal) in {1, 5}]
            assert all(nal in bytes(packet) for nal in slices)


def test_annexb_in_a_file_of_its_own_is_what_came(tmp_path: Path) -> None:
    path = tmp_path / "out.h264"
    sent = record(path, Codec.H264_ANNEXB)
    assert path.read_bytes() == b"".join(frame.data for frame in sent)


@pytest.mark.parametrize(("codec", "name"), [("h264_annexb", "a.gif"), ("h264_fmp4", "a.h264"), ("h264_fmp4", "a.png")])
def test_a_file_that_cannot_hold_h264_is_refused(tmp_path: Path, codec: str, name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"output: got .*{name}.*must end in \.mp4.* with codec {codec}"):
        open_recorder(tmp_path / name, codec, FPS)


@pytest.mark.parametrize("name", ["a.mp4", "a.h264"])
def test_what_is_discarded_leaves_nothing(tmp_path: Path, name: str) -> None:
    open_recorder(tmp_path / name, "h264_annexb", FPS).discard()
    recorder = open_recorder(tmp_path / name, "h264_annexb", FPS)
    recorder.take(frames(Codec.H264_ANNEXB)[0])
    recorder.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="must be a file in an existing folder"):
        open_recorder(tmp_path / "nowhere" / "a.mp4", "h264_annexb", FPS)
