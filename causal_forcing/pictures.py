"""Start images: what is accepted as one, and how it becomes a frame. Imports neither torch nor av."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from causal_forcing.errors import InvalidRequest

_REASON = "INVALID_IMAGE"


@dataclass(frozen=True)
class PictureRules:
    """What is accepted as a picture.

    Attributes:
        field: Names the picture in errors.
        formats: Accepted formats, as Pillow names them.
        max_bytes: Largest file, in whole MiB.
        max_pixels: Largest picture; a few kilobytes of PNG can claim to be terabytes.
        allowed: What must be given, in words.
    """

    field: str
    formats: tuple[str, ...]
    max_bytes: int
    max_pixels: int
    allowed: str

    def check(self, data: bytes) -> None:
        """Check a picture's size and header; nothing is decompressed.

        Raises:
            InvalidRequest: It is not acceptable.
        """
        if len(data) > self.max_bytes:
            raise self.refusal(f"{len(data)} bytes", f"must be at most {self.max_bytes >> 20} MiB")
        with self._opened(data) as picture:
            width, height = picture.size
        if width * height > self.max_pixels:
            raise self.refusal(f"{width}x{height} pixels", f"must be at most {self.max_pixels} pixels")

    def read(self, data: bytes, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Return a picture as a frame ``[H, W, 3]`` uint8 RGB: upright (EXIF), cropped and resampled.

        Transparency is dropped, grey of 16 bits becomes grey of 8.

        Raises:
            InvalidRequest: It is not acceptable, or damaged.
        """
        self.check(data)
        with self._opened(data) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # convert() would clip the 16 bits
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            colours = upright.convert("RGB")
        return fit(colours, height, width)

    def refusal(self, shown: str, allowed: str) -> InvalidRequest:
        """Return the error that says what is wrong with a picture."""
        return InvalidRequest(self.field, shown, allowed, reason=_REASON)

    @contextmanager
    def _opened(self, data: bytes) -> Iterator[Image.Image]:
        """Open a picture; everything that its bytes can cause becomes the same refusal."""
        try:
            with Image.open(io.BytesIO(data), formats=self.formats) as picture:
                yield picture
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise self.refusal(f"{len(data)} bytes ({type(error).__name__})", self.allowed) from error


def fit(picture: Image.Image, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return an RGB picture as a frame ``[H, W, 3]``, cropped around its centre and resampled: nothing is distorted."""
    return np.asarray(ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS), np.uint8)
