"""What a client is told about the model."""

from __future__ import annotations

import pytest

from causal_forcing.version import __version__
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.admission.claims import claim
from serve.config import load_config
from serve.gateway.model_facts import describe_model
from serve.gateway.requests import parse_config
from serve.messages import Share
from tests.serve.fakes import simulated


@pytest.mark.parametrize(("preset", "device"), [("tiny", "cpu"), ("causal-forcing-chunkwise", "cuda")])
def test_the_memory_of_a_session_is_what_admission_counts(preset: str, device: str) -> None:
    service = load_config(None, preset=preset, device=device)
    told = describe_model(service).sizes[0].generator_byte_count
    prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="anything")])
    request = parse_config(pb.SessionConfig(prompt=prompt), service)
    assert told == claim("a", request, Share(), service).nbytes > 0


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


def test_the_default_window_is_one_that_is_allowed() -> None:
    told = describe_model(simulated(max_window_frames=6))
    assert told.default_config.window_frames == told.max_window_frames == 6
