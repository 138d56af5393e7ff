"""The arithmetic of a session's memory agrees with what is allocated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from causal_forcing.config import SinkRope
from causal_forcing.footprint import session_bytes
from causal_forcing.presets import get_preset
from causal_forcing.weights.memory import required_bytes


@pytest.mark.parametrize("name", ["tiny", "causal-forcing-framewise"])
@pytest.mark.parametrize("rope", list(SinkRope))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_the_memory_plan_says(name: str, rope: SinkRope, dtype: torch.dtype) -> None:
    preset = get_preset(name)
    config = replace(preset.session_config(window_frames=12, sink_frames=3), sink_rope=rope)
    plan = required_bytes(preset, None, config, dtype, text_encoder=False)
    per_session = sum(size for what, size in plan.items if "keys and values" in what)
    assert session_bytes(preset.transformer, config, dtype.itemsize) == per_session


def test_the_published_model_needs_six_gigabytes() -> None:
    preset = get_preset("causal-forcing-framewise")
    nbytes = session_bytes(preset.transformer, preset.session_config(window_frames=21), 2)
    assert nbytes == pytest.approx(6.1e9, rel=0.02)
