"""What is accepted as a start image, decided from its first bytes; it is decoded in the process that encodes it."""

from __future__ import annotations

from causal_forcing.pictures import PictureRules

from .frames import Pixels

MAX_BYTES = 4 << 20
"""Largest file."""

MAX_PIXELS = 16_000_000
"""Largest picture."""

_RULES = PictureRules("start_image", ("JPEG", "PNG"), MAX_BYTES, MAX_PIXELS, "must be a JPEG or PNG image")


def check_start_image(data: bytes) -> None:
    """Check a start image's size and header; nothing is decompressed.

    Raises:
        InvalidRequest: If it is not an acceptable JPEG or PNG file.
    """
    _RULES.check(data)


def read_start_image(data: bytes, height: int, width: int) -> Pixels:
    """Return a start image as a frame ``[H, W, 3]``: upright, cropped around its centre and resampled.

    Raises:
        InvalidRequest: If the file is not acceptable, or damaged.
    """
    return _RULES.read(data, height, width)
