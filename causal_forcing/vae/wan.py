"""The Wan2.1 autoencoder as a streaming encoder and decoder whose memory is passed in.

Source: Wan2.1 ``wan/modules/vae.py`` (architecture and key names); the streaming rules are those of its cached
inference, but always latent by latent, so that any split of a stream over calls gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from causal_forcing.config import VaeConfig
from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import TEMPORAL_STRIDE, Geometry
from causal_forcing.vae.layers import (
    CausalConv,
    Downsample,
    FrameAttention,
    PixelLinear,
    ResidualBlock,
    RmsNormSilu,
    Upsample,
)
from causal_forcing.vae.state import DecoderState, EncoderState, StreamState

_GROUP_BYTES = 4 << 20
"""Frames of a layer are computed together up to this size, and one by one above it, where grouping gains no speed
(measured) and costs memory. Results cannot come to depend on how a stream is split: only the frame size decides."""

State = TypeVar("State", bound=StreamState)


class WanVae(nn.Module):
    """Weights of a Wan autoencoder; parameter names are those of the original checkpoints.

    Args:
        config: Sizes.
    """

    REACH: ClassVar[int] = 38
    """Latent frames that a pixel frame depends on (measured: 38 exact, 37 not)."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = PixelLinear(2 * config.z_dim, 2 * config.z_dim)
        self.conv2 = PixelLinear(config.z_dim, config.z_dim)
        self.decoder = Decoder(config)
        for name, layer in self.named_modules():
            if isinstance(layer, CausalConv):
                layer.slot = name

    def new_decoder_state(
        self, geometry: Geometry, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecoderState:
        """Return the state of a stream that has not begun.

        Args:
            geometry: Frame size.
            device: Where to put it; default where the weights are. ``"meta"`` to ask for its size only.
            dtype: Default that of the weights.
        """
        return self._new_state(DecoderState, self.decoder, geometry, device, dtype)

    def new_encoder_state(
        self, geometry: Geometry, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EncoderState:
        """Return the state of a stream that has not begun; arguments as for :meth:`new_decoder_state`."""
        return self._new_state(EncoderState, self.encoder, geometry, device, dtype)

    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        """Decode the next latents of a stream.

        Args:
            latents: Normalised, ``[1, 16, F, h, w]``, any F from 1.
            state: The stream's; advanced in place.

        Returns:
            Pixels ``[1, 3, f, H, W]`` float32 in [-1, 1]; four frames a latent, but one for the first of a scene.

        Raises:
            SessionStateError: If an earlier decode broke off (reason ``DECODER_STATE_FAILED``).
            ValueError: If the latents do not fit the state; the state is as before.
        """
        return self.decode_unclamped(latents, state).clamp_(-1, 1)

    @torch.no_grad()
    def decode_unclamped(self, latents: Tensor, state: DecoderState) -> Tensor:
        """Do as :meth:`decode` without limiting the range."""
        geometry = state.geometry
        if latents.dim() != 5 or latents.shape != geometry.latent_shape(latents.shape[2]) or not latents.shape[2]:
            raise ValueError(f"latents {list(latents.shape)} must be {list(geometry.latent_shape(1))} or more frames")
        self._require_fitting(state)
        mean, std = _constants(self.config, latents.device)
        with state.advancing():
            frames = []
            for latent in latents[0].unbind(1):  # [16, h, w]
                pixels = (latent.permute(1, 2, 0).float() * std + mean).to(self.conv2.weight.dtype)
                frames += [part.float() for part in self.decoder(self.conv2(pixels[None]), state)]
                state.frames += 1
            return torch.cat(frames).permute(3, 0, 1, 2).contiguous().unsqueeze(0)

    def encode(self, video: Tensor, state: EncoderState | None = None) -> Tensor:
        """Encode the next pixel frames of a stream.

        Args:
            video: ``[1, 3, f, H, W]`` in [-1, 1]; f is 1 + 4k where a scene begins, else 4k.
            state: The stream's, advanced in place; None to encode a video by itself.

        Returns:
            Normalised latents ``[1, 16, F, h, w]`` (the mean, nothing is sampled), dtype of the weights.

        Raises:
            InvalidRequest: If the size or the number of frames is not allowed.
            SessionStateError: If an earlier encode broke off (reason ``ENCODER_STATE_FAILED``).
        """
        mean, std = _constants(self.config, video.device)
        latents = self.encode_moments(video, state)[:, : self.config.z_dim].float()
        shape = (1, -1, 1, 1, 1)
        return ((latents - mean.view(shape)) / std.view(shape)).to(self.conv1.weight.dtype)

    @torch.no_grad()
    def encode_moments(self, video: Tensor, state: EncoderState | None = None) -> Tensor:
        """Return mean and log-variance of the raw latents, ``[1, 32, F, h, w]``; else as :meth:`encode`."""
        if video.dim() != 5 or video.shape[:2] != (1, 3):
            raise InvalidRequest("video", list(video.shape), "must have the shape [1, 3, frames, height, width]")
        geometry = Geometry(video.shape[3], video.shape[4])
        state = self.new_encoder_state(geometry, device=video.device) if state is None else state
        if geometry != state.geometry:
            raise InvalidRequest("video", list(video.shape), f"must be {state.geometry.height}x{state.geometry.width}")
        self._require_fitting(state)
        groups = _frame_groups(video.shape[2], first=state.frames == 0)
        frames = video[0].permute(1, 2, 3, 0).to(self.conv1.weight.dtype)  # [f, H, W, 3]
        with state.advancing():
            moments = []
            for group in torch.split(frames, groups):
                moments.append(self.conv1(self.encoder(group.contiguous(), state)))
                state.frames += 1
            return torch.cat(moments).permute(3, 0, 1, 2).unsqueeze(0)

    def _require_fitting(self, state: StreamState) -> None:
        weight, buffer = self.conv2.weight, next(iter(state.buffers.values()))
        if (weight.dtype, weight.device) != (buffer.dtype, buffer.device):
            raise ValueError(
                f"state is {buffer.dtype} on {buffer.device}, the weights {weight.dtype} on {weight.device}"
            )

    def _new_state(
        self,
        kind: type[State],
        part: nn.Module,
        geometry: Geometry,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> State:
        like = self.conv2.weight
        buffers = {}
        for layer in part.modules():
            if isinstance(layer, CausalConv):
                height, width = (int(size * layer.scale) for size in (geometry.latent_height, geometry.latent_width))
                shape = (layer.remembered, height, width, layer.in_channels)
                buffers[layer.slot] = torch.zeros(shape, device=device or like.device, dtype=dtype or like.dtype)
        return kind(geometry, buffers)


class Decoder(nn.Module):
    """From latent pixels to colours, one latent frame a call."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in reversed(config.dim_mult)]
        self.conv1 = CausalConv(config.z_dim, widths[0], (3, 3, 3), 1)
        self.middle = _middle(widths[0], 1)
        self.upsamples = nn.ModuleList()
        temporal = config.temporal_downsample[::-1]
        channels, scale = widths[0], 1
        for stage, width in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(channels, width, scale))
                channels = width
            if stage < len(temporal):
                self.upsamples.append(Upsample(channels, scale, temporal=temporal[stage]))
                channels, scale = channels // 2, 2 * scale
        self.head = nn.ModuleDict({"0": RmsNormSilu(channels), "2": CausalConv(channels, 3, (3, 3, 3), scale)})

    def forward(self, x: Tensor, state: DecoderState) -> list[Tensor]:
        """Map ``[1, h, w, 16]`` to one or four pixel frames, in parts ``[T, H, W, 3]``."""
        x = self.conv1(x, state)
        for block in self.middle:
            x = block(x, state)
        return list(self._upsample(x, state, 0))

    def _upsample(self, x: Tensor, state: DecoderState, first: int) -> Iterator[Tensor]:
        """Run the blocks from ``first`` on; large frames go through all that is left one by one."""
        for index in range(first, len(self.upsamples)):
            parts = _groups(x)
            if len(parts) > 1:
                for part in parts:
                    yield from self._upsample(part, state, index)
                return
            x = self.upsamples[index](x, state)
        yield self.head["2"](self.head["0"](x), state)


class Encoder(nn.Module):
    """From colours to latent pixels, one latent frame (one or four pixel frames) a call."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in config.dim_mult]
        scale = 2.0 ** len(config.temporal_downsample)
        self.conv1 = CausalConv(3, widths[0], (3, 3, 3), scale)
        self.downsamples = nn.ModuleList()
        channels = widths[0]
        for stage, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(channels, width, scale))
                channels = width
            if stage < len(config.temporal_downsample):
                self.downsamples.append(Downsample(channels, scale, temporal=config.temporal_downsample[stage]))
                scale /= 2
        self.middle = _middle(channels, scale)
        self.head = nn.ModuleDict(
            {"0": RmsNormSilu(channels), "2": CausalConv(channels, 2 * config.z_dim, (3, 3, 3), scale)}
        )

    def forward(self, x: Tensor, state: EncoderState) -> Tensor:
        """Map ``[1 or 4, H, W, 3]`` to ``[1, h, w, 32]``."""
        blocks = list(self.downsamples)
        joint = next(i for i, block in enumerate(blocks) if getattr(block, "time_conv", None) is not None)
        parts = []
        for part in _groups(x, self.conv1.weight.shape[0]):  # frames are independent calls until time is halved
            hidden = self.conv1(part, state)
            for block in blocks[:joint]:
                hidden = block(hidden, state)
            parts.append(hidden)
        x = torch.cat(parts)
        for block in (*blocks[joint:], *self.middle):
            x = block(x, state)
        result: Tensor = self.head["2"](self.head["0"](x), state)
        return result


def _middle(channels: int, scale: float) -> nn.ModuleList:
    blocks = (
        ResidualBlock(channels, channels, scale),
        FrameAttention(channels),
        ResidualBlock(channels, channels, scale),
    )
    return nn.ModuleList(blocks)


def _groups(x: Tensor, channels: int | None = None) -> tuple[Tensor, ...]:
    """Split ``[T, H, W, C]`` into single frames if it is large (with that many channels instead of C)."""
    size = x.nbytes if channels is None else x.nbytes // x.shape[-1] * channels
    return (x,) if size <= _GROUP_BYTES else torch.split(x, 1)


def _frame_groups(frames: int, *, first: bool) -> list[int]:
    """Return how many pixel frames make each latent, or raise :class:`InvalidRequest`."""
    rest = frames - 1 if first else frames
    if rest < 0 or rest % TEMPORAL_STRIDE or not frames:
        allowed = f"must be {'1 frame plus ' if first else ''}a multiple of {TEMPORAL_STRIDE} frames"
        raise InvalidRequest("video", f"{frames} frames", allowed)
    return [1] * first + [TEMPORAL_STRIDE] * (rest // TEMPORAL_STRIDE)


@lru_cache(maxsize=16)
def _constants(config: VaeConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each latent channel, float32 ``[16]``."""
    mean = torch.tensor(config.latent_mean, dtype=torch.float32, device=device)
    return mean, torch.tensor(config.latent_std, dtype=torch.float32, device=device)
