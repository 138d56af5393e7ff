"""Start images: what is accepted, and that nothing large is decompressed to find out."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from causal_forcing.errors import InvalidRequest
from serve.codecs.images import MAX_BYTES, MAX_PIXELS, check_start_image, read_start_image


def file_of(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few hundred bytes that claims to be that large."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(100))) + part(b"IEND", b"")


RED = Image.new("RGB", (40, 20), (255, 0, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_scaled_and_cropped_around_its_centre(kind: str) -> None:
    wide = Image.new("RGB", (400, 100), (0, 0, 255))
    wide.paste((0, 255, 0), (150, 0, 250, 100))
    frame = read_start_image(file_of(wide, kind), 32, 32)
    assert frame.shape == (32, 32, 3)
    assert np.abs(frame.astype(int) - (0, 255, 0)).max() < 60


def test_a_picture_is_turned_upright_and_loses_its_transparency() -> None:
    sideways = Image.new("RGB", (100, 100), (0, 0, 255))
    sideways.paste((255, 0, 0), (0, 0, 50, 100))  # red on the left is red at the top, once turned by orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    frame = read_start_image(file_of(sideways, "JPEG", exif=exif.tobytes()), 32, 32)
    assert frame[2, 16, 0] > 200
    assert frame[29, 16, 2] > 200
    assert read_start_image(file_of(RED.convert("RGBA"), "PNG"), 32, 32).shape == (32, 32, 3)


REFUSED = [
    pytest.param(b"", "JPEG or PNG", id="nothing"),
    pytest.param(b"hello" * 30, "JPEG or PNG", id="text"),
    pytest.param(file_of(RED, "WEBP"), "JPEG or PNG", id="another format"),
    pytest.param(file_of(RED, "GIF"), "JPEG or PNG", id="an animation's format"),
    pytest.param(bytes(MAX_BYTES + 1), "at most 4 MiB", id="too many bytes"),
    pytest.param(bomb(4001, 4000), f"at most {MAX_PIXELS} pixels", id="too many pixels"),
    pytest.param(bomb(60_000, 60_000), "", id="a bomb"),
]


@pytest.mark.parametrize(("data", "allowed"), REFUSED)
def test_what_is_not_acceptable_is_refused_before_it_is_decompressed(data: bytes, allowed: str) -> None:
    with pytest.raises(InvalidRequest, match="start_image: got") as caught:
        check_start_image(data)
    assert caught.value.reason == "INVALID_IMAGE"
    assert allowed in caught.value.metadata["allowed"]
    with pytest.raises(InvalidRequest):
        read_start_image(data, 32, 32)


def test_a_damaged_file_is_refused_when_it_is_read() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), "PNG")[:-3000]
    check_start_image(data)
    with pytest.raises(InvalidRequest, match="JPEG or PNG"):
        read_start_image(data, 32, 32)


def test_the_largest_picture_is_accepted() -> None:
    check_start_image(bomb(4000, 4000))
