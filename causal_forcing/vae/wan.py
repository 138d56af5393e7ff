"""The Wan2.1 autoencoder as a streaming encoder and decoder whose memory is passed in.

Source: Wan2.1 ``wan/modules/vae.py`` (architecture and key names); the streaming rules are those of its cached
inference, latent by latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from causal_forcing.config import VaeConfig
from causal_forcing.vae.layers import (
    CausalConv,
    Convolution,
    Downsample,
    FrameAttention,
    ResidualBlock,
    RmsNormSilu,
    Upsample,
    groups,
)
from causal_forcing.vae.state import DecoderState, EncoderState, StreamState
from causal_forcing.vae.streaming import StreamingVae


class WanVae(StreamingVae):
    """Weights of a Wan autoencoder; parameter names are those of the original checkpoints.

    Args:
        config: Sizes.
    """

    REACH: ClassVar[int] = 38
    """Latent frames that a pixel frame depends on (measured: 38 exact, 37 not)."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config.latent_mean, config.latent_std)
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = Convolution(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = Convolution(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self._name_slots()

    def decode_frame(self, latent: Tensor, state: DecoderState) -> list[Tensor]:
        """Decode a raw latent ``[1, h, w, 16]`` to its pixel frames, in parts ``[T, H, W, 3]``."""
        return list(self.decoder(self.conv2(latent), state))

    def encode_frames(self, frames: Tensor, state: EncoderState) -> Tensor:
        """Return a latent's mean, ``[1, h, w, 16]``; the encoder's other 16 channels are its log-variance."""
        moments: Tensor = self.conv1(self.encoder(frames, state))
        return moments[..., : self.config.z_dim]


class Decoder(nn.Module):
    """From latent pixels to colours, one latent frame a call."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in reversed(config.dim_mult)]
        self.conv1 = CausalConv(config.z_dim, widths[0], (3, 3), 1)
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
        self.head = nn.ModuleDict({"0": RmsNormSilu(channels), "2": CausalConv(channels, 3, (3, 3), scale)})

    def forward(self, x: Tensor, state: DecoderState) -> list[Tensor]:
        """Map ``[1, h, w, 16]`` to one or four pixel frames, in parts ``[T, H, W, 3]``."""
        x = self.conv1.stream(x, state)
        for block in self.middle:
            x = block(x, state)
        return list(self._upsample(x, state, 0))

    def _upsample(self, x: Tensor, state: DecoderState, first: int) -> Iterator[Tensor]:
        """Run the blocks from ``first`` on; large frames go through all that is left one by one."""
        for index in range(first, len(self.upsamples)):
            parts = groups(x)
            if len(parts) > 1:
                for part in parts:
                    yield from self._upsample(part, state, index)
                return
            x = self.upsamples[index](x, state)
        yield _head(self.head, x, state)


class Encoder(nn.Module):
    """From colours to latent pixels, one latent frame (one or four pixel frames) a call."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in config.dim_mult]
        scale = 2 ** len(config.temporal_downsample)
        self.conv1 = CausalConv(3, widths[0], (3, 3), scale)
        self.downsamples = nn.ModuleList()
        channels = widths[0]
        for stage, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(channels, width, scale))
                channels = width
            if stage < len(config.temporal_downsample):
                self.downsamples.append(Downsample(channels, scale, temporal=config.temporal_downsample[stage]))
                scale //= 2
        self.middle = _middle(channels, scale)
        self.head = nn.ModuleDict(
            {"0": RmsNormSilu(channels), "2": CausalConv(channels, 2 * config.z_dim, (3, 3), scale)}
        )

    def forward(self, x: Tensor, state: EncoderState) -> Tensor:
        """Map ``[1 or 4, H, W, 3]`` to ``[1, h, w, 32]``."""
        blocks = list(self.downsamples)
        joint = next(i for i, block in enumerate(blocks) if getattr(block, "time_conv", None) is not None)
        parts = []
        for part in groups(x, self.conv1.weight.shape[0]):  # frames are independent calls until time is halved
            hidden = self.conv1.stream(part, state)
            for block in blocks[:joint]:
                hidden = block(hidden, state)
            parts.append(hidden)
        x = torch.cat(parts)
        for block in (*blocks[joint:], *self.middle):
            x = block(x, state)
        return _head(self.head, x, state)


def _head(layers: nn.ModuleDict, x: Tensor, state: StreamState) -> Tensor:
    normalise, convolution = layers.values()
    return cast(CausalConv, convolution).stream(normalise(x), state)


def _middle(channels: int, scale: int) -> nn.ModuleList:
    blocks = (
        ResidualBlock(channels, channels, scale),
        FrameAttention(channels),
        ResidualBlock(channels, channels, scale),
    )
    return nn.ModuleList(blocks)
