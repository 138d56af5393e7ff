"""Frame codecs: pixels ``[H, W, 3]`` uint8 RGB to bytes in the decoder, and back in a client."""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import FRAMES_PER_SECOND

Pixels = npt.NDArray[np.uint8]
"""``[H, W, 3]`` uint8 RGB."""

DEFAULT_JPEG_QUALITY = 90
"""What a session gets when it does not say."""

DEFAULT_H264_BIT_RATE = 2_000_000
"""Bits a second that a session gets when it does not say."""

DEFAULT_KEYFRAME_INTERVAL = 64
"""Frames from one keyframe to the next when a session does not say: four seconds."""


class Codec(StrEnum):
    """How a frame becomes bytes."""

    JPEG = "jpeg"
    PNG = "png"
    RAW_RGB24 = "raw_rgb24"
    H264_ANNEXB = "h264_annexb"
    H264_FMP4 = "h264_fmp4"

    @property
    def is_h264(self) -> bool:
        """Whether a frame may need the ones before it."""
        return self in {Codec.H264_ANNEXB, Codec.H264_FMP4}


@dataclass(frozen=True)
class FrameFormat:
    """A codec with its settings, validated on construction; what is None and has a meaning takes its default.

    Attributes:
        codec: The codec.
        jpeg_quality: 1 to 100 for JPEG, None for the others.
        frames_per_second: Rate at which the video is shown, 1 to 60.
        h264_bit_rate: Bits a second, 50,000 to 50,000,000 for H.264, None for the others.
        h264_keyframe_interval_frames: Frames from one keyframe to the next, 1 to 600 for H.264, None for the others.
    """

    codec: Codec = Codec.JPEG
    jpeg_quality: int | None = None
    frames_per_second: int = FRAMES_PER_SECOND
    h264_bit_rate: int | None = None
    h264_keyframe_interval_frames: int | None = None

    def __post_init__(self) -> None:
        self._settle("jpeg_quality", self.codec is Codec.JPEG, DEFAULT_JPEG_QUALITY, 1, 100)
        self._settle("frames_per_second", True, FRAMES_PER_SECOND, 1, 60)
        self._settle("h264_bit_rate", self.codec.is_h264, DEFAULT_H264_BIT_RATE, 50_000, 50_000_000)
        self._settle("h264_keyframe_interval_frames", self.codec.is_h264, DEFAULT_KEYFRAME_INTERVAL, 1, 600)

    def _settle(self, name: str, applies: bool, default: int, least: int, most: int) -> None:
        value: int | None = getattr(self, name)
        if value is None:
            object.__setattr__(self, name, default if applies else None)
        elif not applies:
            raise InvalidRequest(name, value, f"must be left out with codec {self.codec.value}")
        elif not least <= value <= most:
            raise InvalidRequest(name, value, f"must be an integer from {least} to {most}")


@dataclass(frozen=True)
class EncodedFrame:
    """One frame as bytes.

    Attributes:
        data: The bytes.
        keyframe: Whether it can be decoded without those before it.
        init_segment: What a player of fragmented MP4 needs before it; empty but where the encoder was started anew.
    """

    data: bytes
    keyframe: bool = True
    init_segment: bytes = b""


class FrameEncoder(Protocol):
    """Turns one session's frames into bytes, in order."""

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        ...

    def encode(self, pixels: Pixels, number: int, *, keyframe: bool) -> EncodedFrame:
        """Return one frame as bytes.

        Args:
            pixels: ``[H, W, 3]`` uint8 RGB.
            number: Its index in the session; only ever rising.
            keyframe: Whether it must be decodable by itself.
        """
        ...


class StillEncoder:
    """Encodes each frame by itself, as a picture.

    Args:
        frame_format: One of the codecs without memory.
        min_bytes: Pictures are padded with zeros to this size; only simulations want that.
    """

    nbytes = 0

    def __init__(self, frame_format: FrameFormat, min_bytes: int = 0) -> None:
        self._format = frame_format
        self._min_bytes = min_bytes

    def encode(self, pixels: Pixels, number: int, *, keyframe: bool) -> EncodedFrame:  # noqa: ARG002  (every one is)
        """Return one frame as bytes."""
        return EncodedFrame(self._picture(pixels).ljust(self._min_bytes, b"\0"))

    def _picture(self, pixels: Pixels) -> bytes:
        if self._format.codec is Codec.RAW_RGB24:
            return pixels.tobytes()
        buffer = io.BytesIO()
        image = Image.fromarray(pixels)
        if self._format.codec is Codec.PNG:
            image.save(buffer, "PNG", compress_level=1)
        else:
            image.save(buffer, "JPEG", quality=self._format.jpeg_quality)
        return buffer.getvalue()


def new_encoder(frame_format: FrameFormat, height: int, width: int, min_bytes: int = 0) -> FrameEncoder:
    """Return a fresh encoder of frames of one size."""
    if frame_format.codec.is_h264:
        from .h264 import H264Encoder

        return H264Encoder(frame_format, height, width)
    return StillEncoder(frame_format, min_bytes)


def decode_frame(codec: Codec, data: bytes, height: int, width: int) -> Pixels:
    """Return the pixels of one encoded frame, of a codec whose frames stand alone.

    Raises:
        ValueError: If the data is not a frame of that codec and size.
    """
    if codec is Codec.RAW_RGB24:
        if len(data) != height * width * 3:
            raise ValueError(f"{len(data)} bytes are not a {height}x{width} frame")
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    with Image.open(io.BytesIO(data), formats=[codec.value.upper()]) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != (height, width, 3):
        raise ValueError(f"a frame of {pixels.shape[0]}x{pixels.shape[1]} came where {height}x{width} was due")
    return pixels


def split(data: bytes, limit: int) -> list[bytes]:
    """Return the data in parts of at most ``limit`` bytes; at least one part."""
    return [data[start : start + limit] for start in range(0, len(data), limit)] or [b""]
