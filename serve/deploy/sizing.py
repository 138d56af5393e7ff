"""What a service needs of its machines, by arithmetic: memory of each replica, decoding power, bandwidth.

Sizes come from modules and states on the meta device (:mod:`causal_forcing.weights.memory`), so nothing is loaded. What
is not arithmetic is a named constant with its source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from causal_forcing.geometry import FRAMES_PER_SECOND, TEMPORAL_STRIDE, Geometry
from causal_forcing.presets import Preset
from serve.config import ServiceConfig
from serve.messages import PRIME_FRAMES

GIB = 1 << 30

PROCESS_BYTES: Mapping[str, int] = {"cpu": GIB, "cuda": 4 * GIB}
"""Host memory of a replica before weights: interpreter, torch, on a GPU the CUDA context. An estimate, rounded up."""

PLAIN_PROCESS_BYTES = GIB // 2
"""Host memory of a replica without torch. Source: 144 MB measured (Ray 2.60), rounded up."""

CONTEXT_BYTES = GIB // 2
"""Device memory of a CUDA context and its libraries' handles. An estimate."""

COMPRESSION = 8
"""Raw bytes of a frame over its bytes as a JPEG of quality 90, at least; sessions that ask for raw frames need more."""


@dataclass(frozen=True)
class Footprint:
    """Memory of one replica.

    Attributes:
        host_bytes: Of the machine.
        device_bytes: Of its GPU; 0 without one.
    """

    host_bytes: int
    device_bytes: int = 0


def footprints(config: ServiceConfig) -> dict[str, Footprint]:
    """Return the memory of a replica of each deployment, by the deployment's name."""
    sized = _simulated() if config.engine == "simulated" else _computing(config)
    sessions = config.gateway.max_sessions * _session_bytes(config)
    return {"Gateway": Footprint(PLAIN_PROCESS_BYTES + sessions), **sized}


def decode_tflops(config: ServiceConfig) -> float:
    """Return the decoding power that one viewer in real time takes, in TFLOP/s, at the largest size.

    As many latent frames a second as 16 pixel frames take, none of them a scene's first.
    """
    from causal_forcing.arithmetic import decode_flops

    flops = decode_flops(config.model_preset.vae_config(config.vae), *config.largest_size)
    return flops * FRAMES_PER_SECOND / TEMPORAL_STRIDE / 1e12


def _simulated() -> dict[str, Footprint]:
    return dict.fromkeys(("TextEncoder", "Generator", "VaeDecoder"), Footprint(PLAIN_PROCESS_BYTES))


def _computing(config: ServiceConfig) -> dict[str, Footprint]:
    from causal_forcing.weights.loading import default_dtype
    from causal_forcing.weights.memory import PROMPT_CACHE, required_bytes
    from causal_forcing.weights.working_set import decoding_bytes, encoding_bytes

    preset, dtype = config.model_preset, default_dtype(config.device)
    vae, geometry = preset.vae_config(config.vae), Geometry(*config.largest_size)
    whole = dict(required_bytes(preset, config.vae, config.session_config(), dtype).items)
    work = max(  # a chunk, or a start image
        decoding_bytes(vae, geometry, dtype, preset.chunk_frames), encoding_bytes(vae, geometry, dtype, 1)
    )
    decoder = whole[f"VAE weights ({config.vae})"] + config.vae_decoder.cache_bytes + work
    device = {
        "TextEncoder": whole["text encoder weights"] + whole[PROMPT_CACHE],
        "Generator": config.generator_memory().total_bytes,
        "VaeDecoder": decoder,
    }
    if config.device == "cpu":
        return {name: Footprint(PROCESS_BYTES["cpu"] + size) for name, size in device.items()}
    files = _file_bytes(preset, config.vae)
    return {name: Footprint(PROCESS_BYTES["cuda"] + files[name], CONTEXT_BYTES + size) for name, size in device.items()}


def _file_bytes(preset: Preset, vae: str) -> dict[str, int]:
    """Return the bytes of files that each deployment maps to load them; with room they stay in the page cache."""
    sizes = {part: file.size_bytes or 0 for part, file in preset.files}
    return {
        "TextEncoder": sizes.get("text_encoder", 0),
        "Generator": sizes.get("transformer", 0) + sizes.get("lora", 0),
        "VaeDecoder": sizes.get(f"vae/{vae}", 0),
    }


def _session_bytes(config: ServiceConfig) -> int:
    """Return what a gateway holds of one session: its last latents, and frames that its client has credit for."""
    geometry = Geometry(*config.largest_size)
    latents = math.prod(geometry.latent_shape(PRIME_FRAMES)) * 4
    frames = config.limits.max_credit_chunks * config.model_preset.chunk_frames * TEMPORAL_STRIDE
    return latents + frames * geometry.height * geometry.width * 3 // COMPRESSION
