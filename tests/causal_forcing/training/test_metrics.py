"""Numbers about clips, against what is known of them."""

import numpy as np
import pytest
from PIL import Image

from causal_forcing.training import metrics


def texture(shift_per_frame, frames=4):
    rows, columns = np.mgrid[0:64, 0:64]
    clips = []
    for t in range(frames):
        x = columns - shift_per_frame[0] * t
        y = rows - shift_per_frame[1] * t
        value = 127 + 60 * np.sin(x / 5.0) + 60 * np.cos(y / 6.0 + x / 9.0)
        clips.append(np.repeat(value[..., None], 3, axis=-1))
    return np.stack(clips).astype(np.uint8)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.0, 0.0), (-2.0, 1.0), (0.0, 3.0)])
def test_flow_measures_a_known_shift(shift):
    assert metrics.mean_flow(texture(shift)) == pytest.approx(np.hypot(*shift), abs=0.25)


def test_flicker_is_zero_for_steady_change_and_not_for_alternation():
    ramp = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    assert metrics.flicker(ramp) == pytest.approx(0, abs=1e-6)
    assert metrics.flicker(ramp % 2 * 255) == pytest.approx(2.0)


def test_wilson_interval():
    low, high = metrics.wilson(45, 50)
    assert (low, high) == (pytest.approx(0.786, abs=1e-3), pytest.approx(0.957, abs=1e-3))
    assert metrics.wilson(0, 0) == (0.0, 1.0)


def test_sheet_has_a_row_a_clip(tmp_path):
    clips = [np.full((20, 64, 64, 3), value, dtype=np.uint8) for value in (10, 200)]
    metrics.write_sheet(tmp_path / "sheet.png", clips)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (12 * 64, 2 * 64)
        assert sheet.getpixel((5, 100))[0] == 200
