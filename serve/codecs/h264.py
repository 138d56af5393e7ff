"""H.264 without delay: one frame in, one frame out, as an Annex B access unit or as a fragment of MP4."""

from __future__ import annotations

from fractions import Fraction

import av
from av.video.frame import PictureType

from . import fmp4
from .frames import Codec, EncodedFrame, FrameFormat, Pixels

PRESET = "veryfast"
"""x264's trade of time for size; 480x832 takes a few milliseconds a frame."""

FIXED_BYTES = 1_750_000
FRAMES_HELD = 11
"""Memory of an encoder of this preset: a fixed part, and pictures of 1.5 bytes a pixel (measured: the process grows by
1.8 MB an encoder at 64x64 and by 8.3 MB at 480x832)."""


class H264Encoder:
    """Encodes one session's frames; a fresh one begins with a keyframe and its parameter sets.

    Args:
        frame_format: An H.264 codec with its settings.
        height: Pixel rows.
        width: Pixel columns.
    """

    def __init__(self, frame_format: FrameFormat, height: int, width: int) -> None:
        self._format = frame_format
        self._size = (height, width)
        self._init_is_due = frame_format.codec is Codec.H264_FMP4
        self._context = _open(frame_format, height, width)

    @property
    def nbytes(self) -> int:
        """Memory it holds, about."""
        height, width = self._size
        return FIXED_BYTES + FRAMES_HELD * height * width * 3 // 2

    def encode(self, pixels: Pixels, number: int, *, keyframe: bool) -> EncodedFrame:
        """Return one frame as bytes (see :class:`~serve.codecs.frames.FrameEncoder`)."""
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        picture.pts = number
        picture.pict_type = PictureType.I if keyframe else PictureType.NONE
        (packet,) = self._context.encode(picture)
        if self._format.codec is Codec.H264_ANNEXB:
            return EncodedFrame(bytes(packet), packet.is_keyframe)
        nals = fmp4.split_nals(bytes(packet))
        data = fmp4.fragment(nals, number=number, keyframe=packet.is_keyframe)
        return EncodedFrame(data, packet.is_keyframe, self._take_init(nals))

    def _take_init(self, nals: list[bytes]) -> bytes:
        if not self._init_is_due:
            return b""
        self._init_is_due = False
        sps, pps = (next(nal for nal in nals if fmp4.nal_type(nal) == kind) for kind in (7, 8))
        height, width = self._size
        rate = self._format.frames_per_second
        return fmp4.init_segment(width=width, height=height, frames_per_second=rate, sps=sps, pps=pps)


def _open(frame_format: FrameFormat, height: int, width: int) -> av.VideoCodecContext:
    context = av.VideoCodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.framerate = Fraction(frame_format.frames_per_second, 1)
    context.time_base = Fraction(1, frame_format.frames_per_second)
    assert frame_format.h264_bit_rate is not None
    assert frame_format.h264_keyframe_interval_frames is not None
    context.bit_rate = frame_format.h264_bit_rate
    context.gop_size = frame_format.h264_keyframe_interval_frames
    context.max_b_frames = 0
    context.thread_count = 1  # the service runs many encoders; one frame on one thread is fast enough
    kbit = frame_format.h264_bit_rate // 1000
    context.options = {
        "preset": PRESET,
        "tune": "zerolatency",
        "forced-idr": "1",
        "x264-params": f"repeat-headers=1:scenecut=0:vbv-maxrate={kbit}:vbv-bufsize={kbit}",
    }
    return context
