"""Checked requests: defaults, refusals that name field, value and what is allowed, and what the client is told back."""

from __future__ import annotations

from typing import Any

import pytest

from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import Blend, SwitchPolicy
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.codecs.frames import Codec
from serve.config import load_config
from serve.gateway.model_facts import model_info
from serve.gateway.requests import effective_config, parse_config, parse_prompt
from tests.serve.fakes import simulated

FOX = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="a fox")])


def config(**fields: Any) -> pb.SessionConfig:
    return pb.SessionConfig(**{"prompt": FOX, **fields})


def prompts(*texts: str) -> list[pb.WeightedPrompt]:
    return [pb.WeightedPrompt(text=text) for text in texts]


REFUSED = [
    (config(height=64), "width", "64x0", "64x64"),
    (config(height=480, width=832), "height", "480x832", "64x64"),
    (config(height=64, width=80), "width", "64x80", "64x64"),
    (config(seed=-1), "seed", "-1", "0"),
    (config(denoising_steps=[500, 750]), "denoising_steps", "(500, 750)", "descending"),
    (config(denoising_steps=[0]), "denoising_steps", "(0,)", "1 to 1000"),
    (config(window_frames=10), "window_frames", "10", "1 (the sink and one chunk) to 9"),
    (config(window_frames=3, sink_frames=3), "sink_frames", "3", "smaller than window_frames"),
    (config(sink_frames=-1), "sink_frames", "-1", "0"),
    (
        config(codec=9),
        "codec",
        "9",
        "FRAME_CODEC_JPEG, FRAME_CODEC_PNG, FRAME_CODEC_RAW_RGB24, FRAME_CODEC_H264_ANNEXB",
    ),
    (config(jpeg_quality=0), "jpeg_quality", "0", "1 to 100"),
    (config(codec="FRAME_CODEC_PNG", jpeg_quality=80), "jpeg_quality", "80", "left out"),
    (config(credit_chunks=0), "credit_chunks", "0", "1 to 8"),
    (config(credit_chunks=9), "credit_chunks", "9", "1 to 8"),
    (config(frames_per_second=0), "frames_per_second", "0", "1 to 60"),
    (config(frames_per_second=61), "frames_per_second", "61", "1 to 60"),
    (config(h264_bit_rate=100_000), "h264_bit_rate", "100000", "left out with codec jpeg"),
    (config(codec="FRAME_CODEC_H264_ANNEXB", h264_bit_rate=1), "h264_bit_rate", "1", "50000 to 50000000"),
    (config(h264_keyframe_interval_frames=9), "h264_keyframe_interval_frames", "9", "left out with codec jpeg"),
    (
        config(codec="FRAME_CODEC_H264_FMP4", h264_keyframe_interval_frames=601),
        "h264_keyframe_interval_frames",
        "601",
        "1 to 600",
    ),
    (config(codec="FRAME_CODEC_H264_FMP4", jpeg_quality=80), "jpeg_quality", "80", "left out with codec h264_fmp4"),
    (config(pacing=7), "pacing", "7", "PACING_REALTIME, PACING_AS_FAST_AS_POSSIBLE"),
    (config(slow_client_policy=7), "slow_client_policy", "7", "SLOW_CLIENT_POLICY_LOSSLESS"),
    (config(slow_client_policy=2, pacing=2), "slow_client_policy", "DROP_TO_LATEST", "needs PACING_REALTIME"),
    (config(start_image=b"GIF89a" + bytes(100)), "start_image", "106 bytes", "JPEG or PNG"),
    (pb.SessionConfig(), "prompt", "None", "needs the prompt"),
    (config(prompt=pb.PromptUpdate(prompts=prompts("a"), transition_chunks=2)), "transition_chunks", "2", "must be 0"),
    (config(prompt=pb.PromptUpdate(prompts=prompts("a"), policy=2)), "policy", "2", "left out"),
    (config(prompt=pb.PromptUpdate(prompts=prompts("  "))), "prompts.text", "'  '", "not blank"),
    (config(prompt=pb.PromptUpdate(prompts=prompts(*"abcdefghi"))), "prompts", "9 prompts", "1 to 8"),
]


@pytest.mark.parametrize(("message", "field", "value", "allowed"), REFUSED)
def test_a_refusal_names_field_value_and_what_is_allowed(
    message: pb.SessionConfig, field: str, value: str, allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_config(message, simulated())
    assert caught.value.metadata["field"] == field
    assert value in caught.value.metadata["value"]
    assert allowed in caught.value.metadata["allowed"]


def test_what_is_left_out_takes_the_defaults() -> None:
    request = parse_config(config(), simulated())
    preset = simulated().model_preset
    assert (request.config.height, request.config.width) == (preset.height, preset.width)
    assert request.config.denoising_steps == preset.denoising_steps
    assert request.config.window_frames == preset.window_frames
    assert request.format.codec is Codec.JPEG
    assert request.format.jpeg_quality == 90
    assert request.credit_chunks == 2


def test_the_models_sink_gives_way_to_a_window_of_one_chunk_and_the_client_hears_of_it() -> None:
    assert effective_config(parse_config(config(), simulated())).sink_frames == 1
    told = effective_config(parse_config(config(window_frames=1), simulated()))
    assert (told.window_frames, told.sink_frames) == (1, 0)


@pytest.mark.parametrize(("most", "window", "sink"), [(30, 9, 1), (6, 6, 1), (1, 1, 0)])
def test_who_asks_for_no_window_gets_the_models_if_that_is_allowed(most: int, window: int, sink: int) -> None:
    told = effective_config(parse_config(config(), simulated(max_window_frames=most)))
    assert (told.window_frames, told.sink_frames) == (window, sink)


def test_the_server_draws_a_seed_and_tells_it() -> None:
    first, second = (parse_config(config(), simulated()) for _ in range(2))
    assert first.config.seed != second.config.seed
    assert effective_config(first).seed == first.config.seed


EVERY_KIND = [
    {"codec": "FRAME_CODEC_RAW_RGB24", "frames_per_second": 24, "pacing": "PACING_AS_FAST_AS_POSSIBLE"},
    {"codec": "FRAME_CODEC_JPEG", "jpeg_quality": 40, "slow_client_policy": "SLOW_CLIENT_POLICY_DROP_TO_LATEST"},
    {"codec": "FRAME_CODEC_H264_FMP4", "h264_bit_rate": 500_000, "h264_keyframe_interval_frames": 8},
]


@pytest.mark.parametrize("fields", EVERY_KIND)
def test_the_effective_config_asks_for_the_same_session_again(fields: dict[str, Any]) -> None:
    given = config(seed=5, denoising_steps=[1000, 500], window_frames=7, sink_frames=2, credit_chunks=3, **fields)
    request = parse_config(given, simulated())
    again = effective_config(request)
    assert not again.HasField("prompt")
    again.prompt.CopyFrom(FOX)
    assert parse_config(again, simulated()) == request


def test_sizes_of_the_configuration_are_allowed_and_the_first_is_the_default() -> None:
    service = simulated(sizes=[[32, 48], [64, 64]])
    assert parse_config(config(), service).config.geometry.latent_shape(1)[-2:] == (4, 6)
    assert parse_config(config(height=64, width=64), service).config.height == 64


def test_a_prompt_keeps_its_blend_transition_and_policy() -> None:
    message = pb.PromptUpdate(
        prompts=[pb.WeightedPrompt(text="a", weight=0.25), pb.WeightedPrompt(text="b")],
        blend="BLEND_SLERP",
        transition_chunks=4,
        transition="BLEND_SLERP",
        policy="SWITCH_POLICY_RECACHE",
        prompt_id="mine",
    )
    update = parse_prompt(message, 7)
    assert [prompt.weight for prompt in update.prompts] == [0.25, 1.0]
    assert (update.blend, update.transition) == (Blend.SLERP, Blend.SLERP)
    assert (update.transition_chunks, update.policy, update.prompt_id) == (4, SwitchPolicy.RECACHE, "mine")


@pytest.mark.parametrize("field", ["blend", "transition", "policy"])
def test_an_unknown_choice_is_refused(field: str) -> None:
    message = pb.PromptUpdate(prompts=prompts("a"), **{field: 77})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=rf"{field}: got 77; must be one of"):
        parse_prompt(message, 1)


def test_a_long_prompt_id_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt_id: got '65 characters'"):
        parse_prompt(pb.PromptUpdate(prompts=prompts("a"), prompt_id="x" * 65), 1)


def test_random_weights_are_announced() -> None:
    assert not model_info(simulated()).trained
    service = load_config(None, preset="causal-forcing-framewise")
    assert model_info(service).trained
    assert model_info(service).frames_per_second == 16
    assert model_info(load_config(None, preset="causal-forcing-chunkwise")).frames_per_chunk_count == 12
