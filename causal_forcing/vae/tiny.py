"""Tiny autoencoders (`tae`, `lighttae`): Wan latents at a twenty-fifth of the Wan decoder's arithmetic.

Layout as in :mod:`causal_forcing.vae.layers`. The decoder makes four pixel frames of every latent frame and drops the
first three of a scene; accordingly the encoder repeats the first pixel frame of a scene three times before it.

Source of the architecture and key names: madebyollin/taehv@1f14a56:taehv.py (taew2_1), lightx2v/Autoencoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from causal_forcing.config import TinyVaeConfig
from causal_forcing.geometry import LATENT_CHANNELS, TEMPORAL_STRIDE
from causal_forcing.vae.layers import Convolution, DoublingConv, TemporalLayer, groups
from causal_forcing.vae.state import DecoderState, EncoderState, StreamState
from causal_forcing.vae.streaming import StreamingVae

_CLAMP = 3.0
"""Latents are limited softly to plus or minus this."""

_BLOCKS = 3
"""Memory blocks at each resolution."""

_GROWTH = (1, 2, 2)
"""Frames that each of the decoder's three enlargements makes of one."""

_POOLING = (2, 2, 1)
"""Frames that each of the encoder's three reductions joins into one."""


class TinyVae(StreamingVae):
    """Weights of a tiny autoencoder; parameter names are those of the public files.

    Args:
        config: Sizes, and which latents it takes.
    """

    REACH: ClassVar[int] = 8
    """Latent frames that a pixel frame depends on: six blocks look one latent back, three half of one (rounded up)."""

    def __init__(self, config: TinyVaeConfig) -> None:
        as_they_are = ((0.0,) * LATENT_CHANNELS, (1.0,) * LATENT_CHANNELS)
        raw = (config.latent_mean, config.latent_std)
        super().__init__(*(as_they_are if config.takes_normalised_latents else raw))
        self.config = config
        self.encoder = _Encoder(config.channels[-1])
        self.decoder = _Decoder(config.channels)
        self._name_slots()

    def decode_frame(self, latent: Tensor, state: DecoderState) -> list[Tensor]:
        """Decode a latent ``[1, h, w, 16]`` to its pixel frames, in parts ``[T, H, W, 3]``."""
        parts = [part.mul(2).sub_(1) for part in self.decoder(latent, state)]
        return [parts[-1][-1:]] if state.frames == 0 else parts

    def encode_frames(self, frames: Tensor, state: EncoderState) -> Tensor:
        """Encode the one (at the start) or four pixel frames ``[T, H, W, 3]`` of a latent ``[1, h, w, 16]``."""
        full = torch.cat((frames[:1].expand(TEMPORAL_STRIDE - frames.shape[0], -1, -1, -1), frames))
        latent: Tensor = self.encoder(full.add(1).div_(2), state)
        return latent


class _MemoryBlock(nn.Module, TemporalLayer):
    """Three convolutions over a frame beside the one before it, plus the frame; ReLU."""

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(
            {
                "0": Convolution(2 * channels, channels, (3, 3)),
                "2": Convolution(channels, channels, (3, 3)),
                "4": Convolution(channels, channels, (3, 3)),
            }
        )
        self.remembered, self.channels, self.scale = 1, channels, scale

    def stream(self, x: Tensor, state: StreamState) -> Tensor:
        """Map ``[T, H, W, C]`` to the same shape and remember the last frame."""
        first, second, third = self.conv.values()
        before = torch.cat((self.past(state), x[:-1]))
        hidden = first(torch.cat((x, before), dim=-1)).relu_()
        result = cast(Tensor, third(second(hidden).relu_())).add_(x).relu_()
        self.remember(x, state)
        return result


class _TimeMap(nn.Module):
    """A linear map of pixels that makes several frames of one, or one of several."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Convolution(in_channels, out_channels, (1, 1), bias=False)

    def grow(self, x: Tensor, factor: int) -> Tensor:
        """Map ``[T, H, W, C]`` to ``[factor * T, H, W, C]``."""
        mapped: Tensor = self.conv(x)  # the earliest frame's channels first
        return mapped if factor == 1 else torch.stack(mapped.chunk(factor, dim=-1), dim=1).flatten(0, 1)

    def pool(self, x: Tensor, factor: int) -> Tensor:
        """Map ``[factor * T, H, W, C]`` to ``[T, H, W, C]``."""
        result: Tensor = self.conv(x if factor == 1 else torch.cat([x[i::factor] for i in range(factor)], dim=-1))
        return result


class _Decoder(nn.ModuleDict):
    """Keys are positions in the public files' sequence, which also counts layers without weights."""

    def __init__(self, channels: tuple[int, int, int, int]) -> None:
        super().__init__({"1": Convolution(LATENT_CHANNELS, channels[0], (3, 3))})
        position, scale = 3, 1
        for factor, width, narrower in zip(_GROWTH, channels, channels[1:], strict=False):
            for _ in range(_BLOCKS):
                self[str(position)] = _MemoryBlock(width, scale)
                position += 1
            self[str(position + 1)] = _TimeMap(width, factor * width)  # after the upsampling, which has no weights
            self[str(position + 2)] = DoublingConv(width, narrower, bias=False)
            position, scale = position + 3, 2 * scale
        self[str(position + 1)] = Convolution(channels[-1], 3, (3, 3))

    def forward(self, latent: Tensor, state: DecoderState) -> Iterator[Tensor]:
        """Map ``[1, h, w, 16]`` to four pixel frames in [0, 1] (about), in parts ``[T, H, W, 3]``."""
        first, *rest = self.values()
        x = first(torch.tanh(latent / _CLAMP) * _CLAMP).relu_()
        return self._enlarge(x, state, rest)

    def _enlarge(self, x: Tensor, state: DecoderState, layers: list[nn.Module], stage: int = 0) -> Iterator[Tensor]:
        """Run the layers left; large frames go through them one by one."""
        if stage == len(_GROWTH):
            yield layers[0](x.relu_())
            return
        *blocks, growth, doubling = layers[: _BLOCKS + 2]
        for hidden in groups(x):
            for block in blocks:
                hidden = cast(_MemoryBlock, block).stream(hidden, state)  # noqa: PLW2901
            # A linear map of pixels and the repetition of pixels commute; the public code repeats first.
            for frames in groups(cast(_TimeMap, growth).grow(hidden, _GROWTH[stage])):
                yield from self._enlarge(doubling(frames), state, layers[_BLOCKS + 2 :], stage + 1)


class _Encoder(nn.ModuleDict):
    """Keys are positions in the public files' sequence, as in the decoder."""

    def __init__(self, width: int) -> None:
        super().__init__({"0": Convolution(3, width, (3, 3))})
        position, scale = 2, 2 ** len(_POOLING)
        for factor in _POOLING:
            self[str(position)] = _TimeMap(factor * width, width)
            self[str(position + 1)] = Convolution(width, width, (3, 3), stride=2, bias=False)
            position, scale = position + 2, scale // 2
            for _ in range(_BLOCKS):
                self[str(position)] = _MemoryBlock(width, scale)
                position += 1
        self[str(position)] = Convolution(width, LATENT_CHANNELS, (3, 3))

    def forward(self, x: Tensor, state: EncoderState) -> Tensor:
        """Map four pixel frames ``[4, H, W, 3]`` in [0, 1] to ``[1, h, w, 16]``."""
        first, *layers, last = self.values()
        pools = iter(_POOLING)
        x = first(x).relu_()
        for layer in layers:
            if isinstance(layer, _MemoryBlock):
                x = layer.stream(x, state)
            elif isinstance(layer, _TimeMap):
                x = layer.pool(x, next(pools))
            else:
                x = layer(x)
        result: Tensor = last(x)
        return result
