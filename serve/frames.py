"""Frame codecs: pixels ``[H, W, 3]`` uint8 RGB to bytes in the decoder, and back in a client."""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from PIL import Image

from causal_forcing.errors import InvalidRequest

Pixels = npt.NDArray[np.uint8]
"""``[H, W, 3]`` uint8 RGB."""

DEFAULT_JPEG_QUALITY = 90
"""What a session gets when it does not say."""


class Codec(StrEnum):
    """How a frame becomes bytes."""

    JPEG = "jpeg"
    PNG = "png"
    RAW_RGB24 = "raw_rgb24"


@dataclass(frozen=True)
class FrameFormat:
    """A codec with its settings, validated on construction.

    Attributes:
        codec: The codec.
        jpeg_quality: 1 to 100 for JPEG, None for the others.
    """

    codec: Codec = Codec.JPEG
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if self.codec is not Codec.JPEG and self.jpeg_quality is not None:
            raise InvalidRequest("jpeg_quality", self.jpeg_quality, f"must be left out with codec {self.codec.value}")
        if self.codec is Codec.JPEG and self.jpeg_quality is None:
            object.__setattr__(self, "jpeg_quality", DEFAULT_JPEG_QUALITY)
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise InvalidRequest("jpeg_quality", self.jpeg_quality, "must be an integer from 1 to 100")

    def encode(self, pixels: Pixels) -> bytes:
        """Return one frame as bytes."""
        if self.codec is Codec.RAW_RGB24:
            return pixels.tobytes()
        buffer = io.BytesIO()
        image = Image.fromarray(pixels)
        if self.codec is Codec.PNG:
            image.save(buffer, "PNG", compress_level=1)
        else:
            image.save(buffer, "JPEG", quality=self.jpeg_quality)
        return buffer.getvalue()


def decode_frame(codec: Codec, data: bytes, height: int, width: int) -> Pixels:
    """Return the pixels of one encoded frame.

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
