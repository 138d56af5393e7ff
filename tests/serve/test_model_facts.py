"""What a client is told about the model."""

from __future__ import annotations

import pytest
import torch

from causal_forcing.kv_cache import CacheLayout, KeyValueCache
from causal_forcing.version import __version__
from serve.config import load_config
from serve.model_facts import describe_model, session_bytes
from tests.serve.fakes import simulated


@pytest.mark.parametrize(
    ("preset", "device", "dtype"),
    [("tiny", "cpu", torch.float32), ("causal-forcing-chunkwise", "cuda", torch.bfloat16)],
)
def test_the_memory_of_a_session_is_what_the_engine_allocates(preset: str, device: str, dtype: torch.dtype) -> None:
    service = load_config(None, preset=preset, device=device)
    config = service.model_preset.session_config()
    layout = CacheLayout(
        capacity=config.cache_frames,
        sink_frames=config.sink_frames,
        sink_rope=config.sink_rope,
        tokens_per_frame=config.geometry.tokens_per_frame,
        evicts=True,
    )
    sizes = service.model_preset.transformer
    cache = KeyValueCache(sizes, layout, device=torch.device("meta"), dtype=dtype)
    text = 2 * sizes.num_layers * sizes.text_len * sizes.dim * dtype.itemsize
    assert session_bytes(service, config) == cache.nbytes + text


def test_the_model_and_its_limits_are_told() -> None:
    service = simulated(sizes=[[32, 48], [64, 64]], max_window_frames=30, limits={"max_generate_s": 9})
    told = describe_model(service)
    assert (told.model.name, told.model.vae, told.model.frames_per_second) == ("tiny", "wan", 16)
    assert [(size.height, size.width) for size in told.sizes] == [(32, 48), (64, 64)]
    assert told.sizes[0].generator_byte_count < told.sizes[1].generator_byte_count
    assert (told.default_config.height, told.default_config.codec) == (32, 1)
    assert not told.default_config.HasField("seed")
    assert (told.max_window_frames, told.max_credit_chunks, told.max_generate_duration.seconds) == (30, 8, 9)
    assert told.limits.pause_timeout.seconds == 300
    assert told.version == __version__
