"""Frozen configuration of models and sessions, validated on construction.

A *model* config says what a checkpoint is (sizes that the weights fix); a :class:`SessionConfig` says what one user
asked for. Presets that combine them live in :mod:`causal_forcing.presets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import LATENT_CHANNELS, Geometry

DEFAULT_STEPS = (1000, 750, 500, 250)
"""Denoising steps before warping. Source: thu-ml/Causal-Forcing@1fc7bbc:configs."""

DEFAULT_SHIFT = 5.0
"""Timestep shift of every checkpoint of Wan2.1's sizes. Source: thu-ml/Causal-Forcing@1fc7bbc:configs."""

MAX_STEPS = 50
"""Upper limit on the number of denoising steps of one chunk."""

MAX_SEED = 2**63 - 1
"""Largest accepted seed."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a causal Wan transformer.

    Source: Wan-AI/Wan2.1-T2V-1.3B config.json and the constants of its modelling code.

    Attributes:
        dim: Width of a token.
        ffn_dim: Inner width of the feed-forward layers.
        num_heads: Attention heads; ``dim / num_heads`` must be even.
        num_layers: Transformer blocks.
        freq_dim: Width of the sinusoidal timestep embedding.
        text_dim: Width of a prompt embedding row.
        text_len: Rows of a prompt embedding; padding rows are zero and are attended to.
        eps: Epsilon of every norm.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must split into {self.num_heads} heads of even width")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Complex pairs of a head that rotate with time, row and column; (22, 21, 21) for 128-wide heads."""
        pairs = self.head_dim // 2
        spatial = pairs // 3
        return pairs - 2 * spatial, spatial, spatial


WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
"""Per-channel mean of Wan2.1 latents. Source: Wan-Video/Wan2.1 wan/modules/vae.py."""

WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Per-channel standard deviation of Wan2.1 latents. Source: as :data:`WAN_LATENT_MEAN`."""


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of a Wan VAE (`wan`, and `lightvae` with a quarter of the channels).

    Attributes:
        base_dim: Channels at full resolution (96 for `wan`, 24 for `lightvae`).
        dim_mult: Channel multipliers per resolution, from full to 1/8.
        num_res_blocks: Residual blocks per resolution (the decoder has one more).
        temporal_downsample: Whether each of the three downsamplings also halves time.
        latent_mean: Per-channel mean that normalises latents.
        latent_std: Per-channel standard deviation that normalises latents.
    """

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD
    z_dim: int = LATENT_CHANNELS


@dataclass(frozen=True)
class TinyVaeConfig:
    """Sizes of a tiny autoencoder (`tae`, `lighttae`).

    Source: madebyollin/taehv@1f14a56 (taew2_1), lightx2v/Autoencoders (lighttaew2_1).

    Attributes:
        channels: Decoder channels per stage, from latent resolution to full.
        takes_normalised_latents: True for `tae` (the transformer's latents as they are), False for `lighttae`
            (``z * std + mean``).
        latent_mean: As in :class:`VaeConfig`; used when ``takes_normalised_latents`` is False.
        latent_std: As in :class:`VaeConfig`.
    """

    channels: tuple[int, int, int, int] = (256, 128, 64, 64)
    takes_normalised_latents: bool = True
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a UMT5 encoder. Source: google/umt5-xxl config.json.

    Attributes:
        text_len: Longest prompt in tokens, the end token included.
    """

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    num_heads: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512


class SinkRope(StrEnum):
    """Where sink keys are rotated to."""

    FIXED = "fixed"
    """They keep their first positions (the reference); meant for streams of training length."""

    RELATIVE = "relative"
    """They follow directly before the rolling window, so that generation can be endless."""


@dataclass(frozen=True)
class SessionConfig:
    """What one user asked for; validated on construction.

    Attributes:
        height: Pixel rows, a multiple of 16.
        width: Pixel columns, a multiple of 16.
        seed: Source of all noise, 0 to 2**63 - 1.
        denoising_steps: Timesteps before warping, strictly descending, each 1 to 1000.
        first_chunk_steps: Steps of the first chunk of a scene, or None for the same.
        window_frames: Latent frames that attention sees, the current chunk and the sink included; None keeps every
            frame and ends the session after ``max_frames``.
        sink_frames: Earliest latent frames that are never evicted.
        sink_rope: Where the sink's keys are rotated to.
        max_frames: Latent frames a session without a window can hold.
        anchor_every_chunks: Rebuild the cache from kept latents every so many chunks, which bounds the cost of an exact
            restore; None never does.
    """

    height: int = 480
    width: int = 832
    seed: int = 42
    denoising_steps: tuple[int, ...] = DEFAULT_STEPS
    first_chunk_steps: tuple[int, ...] | None = None
    window_frames: int | None = 21
    sink_frames: int = 0
    sink_rope: SinkRope = SinkRope.RELATIVE
    max_frames: int = 21
    anchor_every_chunks: int | None = None
    geometry: Geometry = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "geometry", Geometry(self.height, self.width))
        object.__setattr__(self, "denoising_steps", validate_steps("denoising_steps", self.denoising_steps))
        if self.first_chunk_steps is not None:
            object.__setattr__(self, "first_chunk_steps", validate_steps("first_chunk_steps", self.first_chunk_steps))
        _require_int("seed", self.seed, 0, MAX_SEED)
        _require_int("sink_frames", self.sink_frames, 0, 1024)
        _require_int("max_frames", self.max_frames, 1, 4096)
        if self.window_frames is not None:
            _require_int("window_frames", self.window_frames, 1, 1024)
            if self.sink_frames >= self.window_frames:
                raise InvalidRequest(
                    "sink_frames", self.sink_frames, f"must be smaller than window_frames ({self.window_frames})"
                )
        elif self.sink_frames:
            raise InvalidRequest("sink_frames", self.sink_frames, "must be 0 without a window, which never evicts")
        if self.anchor_every_chunks is not None:
            _require_int("anchor_every_chunks", self.anchor_every_chunks, 1, 1_000_000)
        try:
            object.__setattr__(self, "sink_rope", SinkRope(self.sink_rope))
        except ValueError:
            raise InvalidRequest("sink_rope", self.sink_rope, "must be 'fixed' or 'relative'") from None

    @property
    def cache_frames(self) -> int:
        """Latent frames the key-value cache has room for."""
        return self.max_frames if self.window_frames is None else self.window_frames


def validate_steps(field_name: str, steps: Sequence[int]) -> tuple[int, ...]:
    """Return denoising steps as a tuple, or raise :class:`InvalidRequest` naming ``field_name``."""
    allowed = f"must be 1 to {MAX_STEPS} strictly descending integers from 1 to 1000"
    if isinstance(steps, (str, bytes)) or not isinstance(steps, Sequence) or not 1 <= len(steps) <= MAX_STEPS:
        raise InvalidRequest(field_name, steps, allowed, reason="INVALID_STEPS")
    if any(isinstance(s, bool) or not isinstance(s, int) or not 1 <= s <= 1000 for s in steps):
        raise InvalidRequest(field_name, steps, allowed, reason="INVALID_STEPS")
    if any(a <= b for a, b in pairwise(steps)):
        raise InvalidRequest(field_name, steps, allowed, reason="INVALID_STEPS")
    return tuple(steps)


def _require_int(field_name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(field_name, value, f"must be an integer from {low} to {high}")
