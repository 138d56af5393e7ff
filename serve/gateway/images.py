"""What is accepted as a start image, decided from its first bytes; it is decoded in the process that encodes it."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from causal_forcing.errors import InvalidRequest
from serve.codecs.frames import Pixels

FORMATS = ("JPEG", "PNG")
"""Formats of a start image."""

MAX_BYTES = 4 << 20
"""Largest file."""

MAX_PIXELS = 16_000_000
"""Largest picture: a few kilobytes of PNG can claim to be terabytes."""

REASON = "INVALID_IMAGE"


def check_start_image(data: bytes) -> None:
    """Check a start image's size and header; nothing is decompressed.

    Raises:
        InvalidRequest: If it is not an acceptable JPEG or PNG file.
    """
    if len(data) > MAX_BYTES:
        raise InvalidRequest("start_image", f"{len(data)} bytes", f"must be at most {MAX_BYTES} bytes", reason=REASON)
    with _reading(data), Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        width, height = picture.size
    if width * height > MAX_PIXELS:
        allowed = f"must be at most {MAX_PIXELS} pixels"
        raise InvalidRequest("start_image", f"{width}x{height} pixels", allowed, reason=REASON)


def read_start_image(data: bytes, height: int, width: int) -> Pixels:
    """Return a start image as a frame ``[H, W, 3]``: upright, cropped around its centre and resampled.

    Raises:
        InvalidRequest: If the file is not acceptable, or damaged.
    """
    check_start_image(data)
    with _reading(data), Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (width, height), method=Image.Resampling.LANCZOS), np.uint8)


@contextmanager
def _reading(data: bytes) -> Iterator[None]:
    """Turn everything that a picture's bytes can cause into the same refusal."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        shown = f"{len(data)} bytes ({type(error).__name__})"
        raise InvalidRequest("start_image", shown, "must be a JPEG or PNG image", reason=REASON) from error
