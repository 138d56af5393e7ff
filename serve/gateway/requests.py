"""From the protocol's messages to the engine's values, and back; refusals name field, value and what is allowed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from causal_forcing.config import MAX_SEED, SessionConfig
from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import Blend, PromptUpdate, SwitchPolicy, WeightedPrompt
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.codecs.frames import Codec, FrameFormat
from serve.codecs.images import check_start_image
from serve.config import ServiceConfig
from serve.session_request import Goal, SessionRequest

MAX_PROMPT_ID = 64
"""Longest name of a prompt update, in characters."""

CODECS: Mapping[int, Codec] = MappingProxyType(
    {
        pb.FRAME_CODEC_UNSPECIFIED: Codec.JPEG,
        pb.FRAME_CODEC_JPEG: Codec.JPEG,
        pb.FRAME_CODEC_PNG: Codec.PNG,
        pb.FRAME_CODEC_RAW_RGB24: Codec.RAW_RGB24,
        pb.FRAME_CODEC_H264_ANNEXB: Codec.H264_ANNEXB,
        pb.FRAME_CODEC_H264_FMP4: Codec.H264_FMP4,
    }
)
PACINGS: Mapping[int, bool] = MappingProxyType(
    {pb.PACING_UNSPECIFIED: True, pb.PACING_REALTIME: True, pb.PACING_AS_FAST_AS_POSSIBLE: False}
)
"""Whether a session keeps the time of its video."""

SLOW_CLIENT_POLICIES: Mapping[int, bool] = MappingProxyType(
    {
        pb.SLOW_CLIENT_POLICY_UNSPECIFIED: False,
        pb.SLOW_CLIENT_POLICY_LOSSLESS: False,
        pb.SLOW_CLIENT_POLICY_DROP_TO_LATEST: True,
    }
)
"""Whether a client without credit misses chunks."""

BLENDS: Mapping[int, Blend] = MappingProxyType(
    {pb.BLEND_UNSPECIFIED: Blend.LINEAR, pb.BLEND_LINEAR: Blend.LINEAR, pb.BLEND_SLERP: Blend.SLERP}
)
POLICIES: Mapping[int, SwitchPolicy] = MappingProxyType(
    {
        pb.SWITCH_POLICY_UNSPECIFIED: SwitchPolicy.CROSS_ATTENTION,
        pb.SWITCH_POLICY_CROSS_ATTENTION: SwitchPolicy.CROSS_ATTENTION,
        pb.SWITCH_POLICY_RECACHE: SwitchPolicy.RECACHE,
        pb.SWITCH_POLICY_FLUSH: SwitchPolicy.FLUSH,
        pb.SWITCH_POLICY_SCENE_CUT: SwitchPolicy.SCENE_CUT,
    }
)


def parse_config(message: pb.SessionConfig, service: ServiceConfig) -> SessionRequest:
    """Return a checked session request with every default filled in.

    Raises:
        InvalidRequest: If a field is missing or not allowed.
    """
    if not message.HasField("prompt"):
        raise InvalidRequest("prompt", None, "a session needs the prompt of its first chunk", reason="INVALID_PROMPT")
    if message.prompt.transition_chunks:
        allowed = "must be 0 for the first prompt, which has nothing to come from"
        raise InvalidRequest("transition_chunks", message.prompt.transition_chunks, allowed, reason="INVALID_PROMPT")
    if message.prompt.policy:
        allowed = "must be left out of the first prompt, which has no past"
        raise InvalidRequest("policy", message.prompt.policy, allowed, reason="INVALID_PROMPT")
    is_paced = _choice("pacing", message.pacing, PACINGS, pb.Pacing)
    drops = _choice("slow_client_policy", message.slow_client_policy, SLOW_CLIENT_POLICIES, pb.SlowClientPolicy)
    if drops and not is_paced:
        allowed = "needs PACING_REALTIME: without a pace, a session without credit would only make what nobody sees"
        raise InvalidRequest("slow_client_policy", "SLOW_CLIENT_POLICY_DROP_TO_LATEST", allowed)
    if message.start_image:
        check_start_image(message.start_image)
    return SessionRequest(
        config=_engine_config(message, service),
        prompt=parse_prompt(message.prompt, 0),
        format=_format(message),
        credit_chunks=_credit(message, service),
        is_paced=is_paced,
        drops=drops,
        start_image=message.start_image,
    )


def parse_generate(message: pb.GenerateVideoRequest, service: ServiceConfig) -> SessionRequest:
    """Return a checked request for a video of a given length.

    Raises:
        InvalidRequest: If a field is missing or not allowed.
    """
    for field in ("slow_client_policy", "credit_chunks"):
        if getattr(message.config, field):
            raise InvalidRequest(field, getattr(message.config, field), "must be left out: GenerateVideo has no acks")
    if message.config.pacing == pb.PACING_AS_FAST_AS_POSSIBLE:
        allowed = "must be PACING_REALTIME: nothing else slows a server down whose client has stopped reading"
        raise InvalidRequest("pacing", "PACING_AS_FAST_AS_POSSIBLE", allowed)
    limits, length_s = service.limits, message.duration.ToNanoseconds() / 1e9
    if not 0 < length_s <= limits.max_generate_s:
        raise InvalidRequest(
            "duration", f"{length_s:g}s", f"must be more than 0 and at most {limits.max_generate_s:g}s"
        )
    request = parse_config(message.config, service)
    frames = math.ceil(length_s * request.frames_per_second - 1e-6)
    return replace(request, goal=Goal(frames, limits.max_generate_bytes))


def parse_prompt(message: pb.PromptUpdate, number: int) -> PromptUpdate:
    """Return a checked prompt update.

    Args:
        message: What the client sent.
        number: Counts the session's updates from 0; names the update if the client did not.

    Raises:
        InvalidRequest: If a field is not allowed.
    """
    if len(message.prompt_id) > MAX_PROMPT_ID:
        length = f"{len(message.prompt_id)} characters"
        raise InvalidRequest("prompt_id", length, f"must be at most {MAX_PROMPT_ID}", reason="INVALID_PROMPT")
    prompts = tuple(WeightedPrompt(p.text, p.weight if p.HasField("weight") else 1.0) for p in message.prompts)
    return PromptUpdate(
        prompts=prompts,
        blend=_choice("blend", message.blend, BLENDS, pb.Blend),
        transition_chunks=message.transition_chunks,
        transition=_choice("transition", message.transition, BLENDS, pb.Blend),
        policy=_choice("policy", message.policy, POLICIES, pb.SwitchPolicy),
        prompt_id=message.prompt_id or f"prompt-{number}",
    )


def effective_config(request: SessionRequest) -> pb.SessionConfig:
    """Return what a session runs with, for SessionStarted; without the prompt and the start image."""
    config, form = request.config, request.format
    codec = next(number for number, codec in CODECS.items() if codec is form.codec and number)
    policy = pb.SLOW_CLIENT_POLICY_DROP_TO_LATEST if request.drops else pb.SLOW_CLIENT_POLICY_LOSSLESS
    told = pb.SessionConfig(
        height=config.height,
        width=config.width,
        seed=config.seed,
        denoising_steps=config.denoising_steps,
        window_frames=config.window_frames,
        sink_frames=config.sink_frames,
        codec=pb.FrameCodec.Name(codec),
        jpeg_quality=form.jpeg_quality,
        pacing="PACING_REALTIME" if request.is_paced else "PACING_AS_FAST_AS_POSSIBLE",
        frames_per_second=form.frames_per_second,
        h264_bit_rate=form.h264_bit_rate,
        h264_keyframe_interval_frames=form.h264_keyframe_interval_frames,
    )
    if request.goal is None:
        told.credit_chunks = request.credit_chunks
        told.slow_client_policy = policy
    return told


def _engine_config(message: pb.SessionConfig, service: ServiceConfig) -> SessionConfig:
    preset, overrides = service.model_preset, dict[str, Any]()
    for name in ("window_frames", "sink_frames", "seed"):
        if message.HasField(name):
            overrides[name] = getattr(message, name)
    overrides.setdefault("seed", secrets.randbelow(MAX_SEED + 1))
    if message.denoising_steps:
        overrides["denoising_steps"] = tuple(message.denoising_steps)
    overrides["height"], overrides["width"] = _size(message, service)
    config = service.session_config(**overrides)
    limit = service.allowed_window_frames
    least = message.sink_frames + preset.chunk_frames  # the preset's own sink gives way to a small window
    if config.window_frames is None or not least <= config.window_frames <= limit:
        allowed = f"must be {least} (the sink and one chunk) to {limit} latent frames"
        raise InvalidRequest("window_frames", config.window_frames, allowed)
    return config


def _size(message: pb.SessionConfig, service: ServiceConfig) -> tuple[int, int]:
    sizes = service.allowed_sizes
    if not message.HasField("height") and not message.HasField("width"):
        return sizes[0]
    size = (message.height, message.width)
    if size not in sizes:
        allowed = f"must be one of {', '.join(f'{height}x{width}' for height, width in sizes)}"
        field = "height" if message.height not in {height for height, _ in sizes} else "width"
        shown = f"{message.height}x{message.width}"
        raise InvalidRequest(field, shown, f"{allowed} (height x width)", reason="UNSUPPORTED_RESOLUTION")
    return size


def _format(message: pb.SessionConfig) -> FrameFormat:
    given = {
        name: getattr(message, name)
        for name in ("jpeg_quality", "frames_per_second", "h264_bit_rate", "h264_keyframe_interval_frames")
        if message.HasField(name)
    }
    return FrameFormat(_choice("codec", message.codec, CODECS, pb.FrameCodec), **given)


def _credit(message: pb.SessionConfig, service: ServiceConfig) -> int:
    if not message.HasField("credit_chunks"):
        return service.limits.default_credit_chunks
    most = service.limits.max_credit_chunks
    if not 1 <= message.credit_chunks <= most:
        raise InvalidRequest("credit_chunks", message.credit_chunks, f"must be an integer from 1 to {most}")
    return message.credit_chunks


def _choice(field: str, value: int, known: Mapping[int, Any], names: Any) -> Any:  # noqa: ANN401  (enum of any kind)
    if value not in known:
        allowed = ", ".join(names.Name(number) for number in known if number)
        raise InvalidRequest(field, value, f"must be one of {allowed}")
    return known[value]


def duration_ns(seconds: float) -> int:
    """Return seconds as the whole nanoseconds of a protobuf Duration, never negative."""
    return max(0, math.floor(seconds * 1e9))
