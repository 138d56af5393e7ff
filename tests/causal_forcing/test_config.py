"""Configurations: what is refused, and that the message says field, value and what is allowed."""

from dataclasses import FrozenInstanceError

import pytest

from causal_forcing.config import MAX_SEED, SessionConfig, SinkRope, TransformerConfig
from causal_forcing.errors import InvalidRequest
from tests.causal_forcing.builders import make_engine

STEPS_RULE = "must be 1 to 50 strictly descending integers from 1 to 1000"
REFUSED = [
    ({"height": 100}, "height: got 100; must be a positive multiple of 16"),
    ({"width": 0}, "width: got 0; must be a positive multiple of 16"),
    ({"seed": -1}, "seed: got -1; must be an integer from 0 to"),
    ({"seed": MAX_SEED + 1}, f"seed: got {MAX_SEED + 1}; must be an integer from 0 to {MAX_SEED}"),
    ({"seed": 1.5}, "seed: got 1.5; must be an integer"),
    ({"seed": True}, "seed: got True; must be an integer"),
    ({"denoising_steps": ()}, f"denoising_steps: got (); {STEPS_RULE}"),
    ({"denoising_steps": (1001,)}, f"denoising_steps: got (1001,); {STEPS_RULE}"),
    ({"denoising_steps": (500, 0)}, f"denoising_steps: got (500, 0); {STEPS_RULE}"),
    ({"denoising_steps": (500, 750)}, f"denoising_steps: got (500, 750); {STEPS_RULE}"),
    ({"denoising_steps": (500, 500)}, f"denoising_steps: got (500, 500); {STEPS_RULE}"),
    ({"denoising_steps": (1000, 500.0)}, f"denoising_steps: got (1000, 500.0); {STEPS_RULE}"),
    ({"denoising_steps": (True,)}, f"denoising_steps: got (True,); {STEPS_RULE}"),
    ({"denoising_steps": tuple(range(1000, 949, -1))}, "denoising_steps: got (1000, 999"),
    ({"denoising_steps": "1000"}, f"denoising_steps: got '1000'; {STEPS_RULE}"),
    ({"denoising_steps": 1000}, f"denoising_steps: got 1000; {STEPS_RULE}"),
    ({"first_chunk_steps": (250, 500)}, f"first_chunk_steps: got (250, 500); {STEPS_RULE}"),
    ({"window_frames": 0}, "window_frames: got 0; must be an integer from 1 to 1024"),
    ({"window_frames": 2000}, "window_frames: got 2000; must be an integer from 1 to 1024"),
    ({"window_frames": 6, "sink_frames": 6}, "sink_frames: got 6; must be smaller than window_frames (6)"),
    ({"window_frames": None, "sink_frames": 1}, "sink_frames: got 1; must be 0 without a window"),
    ({"sink_frames": -1}, "sink_frames: got -1; must be an integer from 0"),
    ({"sink_rope": "moving"}, "sink_rope: got 'moving'; must be 'fixed' or 'relative'"),
    ({"max_frames": 0}, "max_frames: got 0; must be an integer from 1 to 4096"),
    ({"anchor_every_chunks": 0}, "anchor_every_chunks: got 0; must be an integer from 1"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_allowed_is_refused_by_name(values, message):
    with pytest.raises(InvalidRequest) as caught:
        SessionConfig(**values)
    assert str(caught.value).startswith(message)
    assert caught.value.metadata["field"] == next(reversed(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"window_frames": 4, "sink_frames": 2},
            "window_frames: got 4; must exceed sink_frames (2) by at least a chunk",
        ),
        ({"window_frames": 2}, "window_frames: got 2; must exceed sink_frames (0) by at least a chunk (3 frames)"),
        ({"window_frames": None, "max_frames": 2}, "max_frames: got 2; must be at least a chunk (3 frames)"),
    ],
)
def test_a_window_too_small_for_the_models_chunk_is_refused(values, message):
    with pytest.raises(InvalidRequest) as caught:
        make_engine(chunk_frames=3).new_session(SessionConfig(**values))
    assert str(caught.value).startswith(message)


def test_lists_of_steps_and_names_of_modes_become_values():
    config = SessionConfig(denoising_steps=[1000, 500], sink_rope="fixed")
    assert config.denoising_steps == (1000, 500)
    assert config.sink_rope is SinkRope.FIXED
    assert hash(config) == hash(SessionConfig(denoising_steps=(1000, 500), sink_rope=SinkRope.FIXED))


def test_configurations_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        SessionConfig().seed = 1


def test_cache_frames():
    assert SessionConfig(window_frames=9).cache_frames == 9
    assert SessionConfig(window_frames=None, max_frames=33).cache_frames == 33


def test_rope_splits_a_head_as_the_reference_does():
    assert TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30).rope_pairs == (22, 21, 21)


def test_heads_must_divide_the_width_evenly():
    with pytest.raises(ValueError, match="heads"):
        TransformerConfig(dim=48, ffn_dim=64, num_heads=5, num_layers=1)
    with pytest.raises(ValueError, match="heads"):
        TransformerConfig(dim=45, ffn_dim=64, num_heads=3, num_layers=1)
