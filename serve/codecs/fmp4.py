"""Fragmented MP4 for one H.264 track, one frame a fragment, so that a frame can be shown as soon as it comes.

Source: ISO/IEC 14496-12 (boxes) and 14496-15 (H.264 in them). A muxing library writes a fragment when the next frame
comes, which would delay each frame by one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

TICKS_PER_FRAME = 512
"""Length of a frame in the track's time scale, which is that many times the frame rate."""

_UNITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_SYNC = 0x02000000
"""Sample flags of a keyframe: it depends on no other."""

_NOT_SYNC = 0x01010000
"""Sample flags of any other frame."""


def split_nals(stream: bytes) -> list[bytes]:
    """Return the NAL units of an Annex B byte stream, without start codes."""
    parts = stream.replace(b"\x00\x00\x00\x01", b"\x00\x00\x01").split(b"\x00\x00\x01")
    return [part for part in parts if part]


def nal_type(nal: bytes) -> int:
    """Return a NAL unit's type: 5 is a keyframe's slice, 7 and 8 are parameter sets."""
    return nal[0] & 0x1F


def init_segment(*, width: int, height: int, frames_per_second: int, sps: bytes, pps: bytes) -> bytes:
    """Return what a player needs before the first fragment."""
    scale = frames_per_second * TICKS_PER_FRAME
    sample_table = _box(
        b"stbl",
        _full(b"stsd", 0, 0, struct.pack(">I", 1), _avc1(width, height, sps, pps)),
        *(_full(name, 0, 0, struct.pack(">I", 0)) for name in (b"stts", b"stsc")),
        _full(b"stsz", 0, 0, struct.pack(">II", 0, 0)),
        _full(b"stco", 0, 0, struct.pack(">I", 0)),
    )
    data_reference = _box(b"dinf", _full(b"dref", 0, 0, struct.pack(">I", 1), _full(b"url ", 0, 1)))
    media = _box(
        b"mdia",
        _full(b"mdhd", 0, 0, struct.pack(">IIIIHH", 0, 0, scale, 0, 0x55C4, 0)),  # language: undetermined
        _full(b"hdlr", 0, 0, struct.pack(">I4s12x", 0, b"vide"), b"video\x00"),
        _box(b"minf", _full(b"vmhd", 0, 1, bytes(8)), data_reference, sample_table),
    )
    header = struct.pack(">IIIII8xhhhH", 0, 0, 1, 0, 0, 0, 0, 0, 0) + _UNITY
    track = _box(b"trak", _full(b"tkhd", 0, 7, header, struct.pack(">II", width << 16, height << 16)), media)
    movie_header = (
        struct.pack(">IIIIIH10x", 0, 0, scale, 0, 1 << 16, 1 << 8) + _UNITY + bytes(24) + struct.pack(">I", 2)
    )
    extends = _box(b"mvex", _full(b"trex", 0, 0, struct.pack(">IIIII", 1, 1, TICKS_PER_FRAME, 0, 0)))
    return _box(b"ftyp", b"iso5", struct.pack(">I", 512), b"iso5iso6mp41") + _box(
        b"moov", _full(b"mvhd", 0, 0, movie_header), track, extends
    )


def fragment(nals: Sequence[bytes], *, number: int, keyframe: bool) -> bytes:
    """Return one frame as a fragment.

    Args:
        nals: The frame's NAL units.
        number: The frame's index in the video, from 0.
        keyframe: Whether it can be decoded by itself.
    """
    sample = b"".join(struct.pack(">I", len(nal)) + nal for nal in nals if nal_type(nal) not in {7, 8, 9})
    flags = _SYNC if keyframe else _NOT_SYNC
    parts = (
        _full(b"tfhd", 0, 0x020000, struct.pack(">I", 1)),  # offsets count from this fragment
        _full(b"tfdt", 1, 0, struct.pack(">Q", number * TICKS_PER_FRAME)),
    )
    run_size, head_size = 12 + 4 + 4 + 8, 8 + 16 + 8
    offset = head_size + sum(map(len, parts)) + run_size + 8
    run = _full(b"trun", 0, 0x000601, struct.pack(">IiII", 1, offset, len(sample), flags))
    head = _box(b"moof", _full(b"mfhd", 0, 0, struct.pack(">I", number + 1)), _box(b"traf", *parts, run))
    return head + _box(b"mdat", sample)


def _avc1(width: int, height: int, sps: bytes, pps: bytes) -> bytes:
    configuration = (
        struct.pack(">B3sBBH", 1, sps[1:4], 0xFF, 0xE1, len(sps)) + sps + struct.pack(">BH", 1, len(pps)) + pps
    )
    resolution = 72 << 16
    entry = struct.pack(">6xH16xHHIIIH32xHh", 1, width, height, resolution, resolution, 0, 1, 24, -1)
    return _box(b"avc1", entry, _box(b"avcC", configuration))


def _box(name: bytes, *content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, content)), name) + b"".join(content)


def _full(name: bytes, version: int, flags: int, *content: bytes) -> bytes:
    return _box(name, struct.pack(">I", version << 24 | flags), *content)
