"""What a client is told about the model and its limits; arithmetic only, because a gateway has no torch."""

from __future__ import annotations

from causal_forcing.geometry import FRAMES_PER_SECOND, TEMPORAL_STRIDE
from causal_forcing.version import __version__
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.admission.claims import generator_bytes
from serve.config import ServiceConfig

from .requests import duration_ns, effective_config, parse_config


def model_info(service: ServiceConfig) -> pb.ModelInfo:
    """Return what a client is told about the model."""
    preset = service.model_preset
    return pb.ModelInfo(
        name=preset.name,
        trained=preset.trained and service.engine == "model",
        frames_per_second=FRAMES_PER_SECOND,
        frames_per_chunk_count=TEMPORAL_STRIDE * preset.chunk_frames,
        vae=service.vae,
    )


def session_limits(service: ServiceConfig) -> pb.SessionLimits:
    """Return what a client is told about its limits."""
    told, limits = pb.SessionLimits(), service.limits
    told.silence_timeout.FromNanoseconds(duration_ns(limits.silence_timeout_s))
    told.stall_timeout.FromNanoseconds(duration_ns(limits.stall_timeout_s))
    told.max_duration.FromNanoseconds(duration_ns(limits.max_session_s))
    told.pause_timeout.FromNanoseconds(duration_ns(limits.pause_timeout_s))
    return told


def describe_model(service: ServiceConfig) -> pb.GetModelResponse:
    """Return the model and what sessions may ask of it."""
    ask = pb.SessionConfig(prompt=pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="anything")]))
    default = effective_config(parse_config(ask, service))
    default.ClearField("seed")
    described = pb.GetModelResponse(
        model=model_info(service),
        sizes=[frame_size(service, height, width) for height, width in service.allowed_sizes],
        default_config=default,
        max_window_frames=service.allowed_window_frames,
        max_credit_chunks=service.limits.max_credit_chunks,
        limits=session_limits(service),
        max_generate_byte_count=service.limits.max_generate_bytes,
        version=__version__,
    )
    described.max_generate_duration.FromNanoseconds(duration_ns(service.limits.max_generate_s))
    return described


def frame_size(service: ServiceConfig, height: int, width: int) -> pb.FrameSize:
    """Return a frame size with the memory of a session of it."""
    config = service.session_config(height=height, width=width, window_frames=service.allowed_window_frames)
    return pb.FrameSize(height=height, width=width, generator_byte_count=generator_bytes(service, config))
