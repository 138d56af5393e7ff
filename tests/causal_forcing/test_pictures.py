"""Pictures become frames without losing what they show; see test_media.py and serve's test_images.py for the rest."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from causal_forcing.media import START_IMAGE

RAMP = np.linspace(0, 65535, 48).round().astype(np.uint16)


@pytest.mark.parametrize("orientation", [1, 6])
def test_grey_of_16_bits_keeps_its_levels(orientation: int) -> None:
    levels = np.tile(RAMP, (32, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: to be turned clockwise
    stored = levels if orientation == 1 else np.rot90(levels).copy()
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "PNG", exif=exif.tobytes())
    frame = START_IMAGE.read(buffer.getvalue(), 32, 48)
    expected = np.linspace(0, 255, 48).round()
    assert np.abs(frame.astype(int) - expected[None, :, None]).max() <= 1


def test_a_gateway_reads_pictures_without_torch_and_av() -> None:
    program = "import sys, serve.codecs.images; print([m for m in ('torch', 'av') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
