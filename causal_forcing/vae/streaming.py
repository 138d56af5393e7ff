"""What all streaming autoencoders share: checks, normalisation, and the loop over latent frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import TEMPORAL_STRIDE, Geometry
from causal_forcing.vae.layers import TemporalLayer
from causal_forcing.vae.state import DecoderState, EncoderState, StreamState

State = TypeVar("State", bound=StreamState)


class StreamingVae(nn.Module, ABC):
    """Base of the autoencoders: a subclass says how one latent frame is decoded and encoded.

    Always one latent frame at a time, so that any split of a stream over calls gives the same bits.

    Args:
        latent_mean: Per channel, subtracted from raw latents to normalise them.
        latent_std: Per channel, raw latents are divided by it.
    """

    REACH: ClassVar[int]
    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, latent_mean: tuple[float, ...], latent_std: tuple[float, ...]) -> None:
        super().__init__()
        self._normalisation = (latent_mean, latent_std)

    @abstractmethod
    def decode_frame(self, latent: Tensor, state: DecoderState) -> list[Tensor]:
        """Decode a raw latent ``[1, h, w, 16]`` to its pixel frames, in parts ``[T, H, W, 3]`` in about [-1, 1]."""

    @abstractmethod
    def encode_frames(self, frames: Tensor, state: EncoderState) -> Tensor:
        """Encode the one (at the start) or four pixel frames ``[T, H, W, 3]`` of a raw latent ``[1, h, w, 16]``."""

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
        if latents.dim() != 5 or latents.shape[2] < 1 or latents.shape != state.geometry.latent_shape(latents.shape[2]):
            raise ValueError(
                f"latents {list(latents.shape)} must be {list(state.geometry.latent_shape(1))}, or more frames"
            )
        like = self._require_fitting(state)
        mean, std = _constants(*self._normalisation, latents.device)
        with state.advancing():
            frames = []
            for latent in latents[0].unbind(1):  # [16, h, w]
                raw = (latent.permute(1, 2, 0).float() * std + mean).to(like.dtype)
                frames += [part.float() for part in self.decode_frame(raw.unsqueeze(0), state)]
                state.frames += 1
            return torch.cat(frames).permute(3, 0, 1, 2).contiguous().unsqueeze(0)

    @torch.no_grad()
    def encode(self, video: Tensor, state: EncoderState | None = None) -> Tensor:
        """Encode the next pixel frames of a stream.

        Args:
            video: ``[1, 3, f, H, W]`` in [-1, 1]; f is 1 + 4k where a scene begins, else 4k.
            state: The stream's, advanced in place; None to encode a video by itself.

        Returns:
            Normalised latents ``[1, 16, F, h, w]`` (nothing is sampled), dtype of the weights.

        Raises:
            InvalidRequest: If the size or the number of frames is not allowed; the state is as before.
            SessionStateError: If an earlier encode broke off (reason ``ENCODER_STATE_FAILED``).
        """
        if video.dim() != 5 or video.shape[:2] != (1, 3):
            raise InvalidRequest("video", list(video.shape), "must have the shape [1, 3, frames, height, width]")
        geometry = Geometry(video.shape[3], video.shape[4])
        state = self.new_encoder_state(geometry) if state is None else state
        if geometry != state.geometry:
            expected = f"{state.geometry.height}x{state.geometry.width}"
            raise InvalidRequest("video", f"{geometry.height}x{geometry.width}", f"must be {expected} like its stream")
        like = self._require_fitting(state)
        sizes = _latent_groups(video.shape[2], first=state.frames == 0)
        mean, std = _constants(*self._normalisation, video.device)
        with state.advancing():
            latents = []
            for group in torch.split(video[0].permute(1, 2, 3, 0).to(like.dtype), sizes):  # [T, H, W, 3]
                raw = self.encode_frames(group.contiguous(), state)
                latents.append(((raw.float() - mean) / std).to(like.dtype))
                state.frames += 1
            return torch.cat(latents).permute(3, 0, 1, 2).contiguous().unsqueeze(0)

    def _name_slots(self) -> None:
        """Give every temporal layer its key in the states; called at the end of construction."""
        for name, layer in self.named_modules():
            if isinstance(layer, TemporalLayer):
                layer.slot = name

    def _require_fitting(self, state: StreamState) -> Tensor:
        weight, buffer = next(self.parameters()), next(iter(state.buffers.values()))
        if (weight.dtype, weight.device) != (buffer.dtype, buffer.device):
            raise ValueError(
                f"state is {buffer.dtype} on {buffer.device}, weights are {weight.dtype} on {weight.device}"
            )
        return weight

    def _new_state(
        self,
        kind: type[State],
        part: nn.Module,
        geometry: Geometry,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> State:
        like = next(self.parameters())
        buffers = {}
        with torch.inference_mode(False):  # a state made in inference mode could only ever be used there
            for layer in part.modules():
                if isinstance(layer, TemporalLayer):
                    height, width = geometry.latent_height * layer.scale, geometry.latent_width * layer.scale
                    shape = (layer.remembered, height, width, layer.channels)
                    buffers[layer.slot] = torch.zeros(shape, device=device or like.device, dtype=dtype or like.dtype)
        return kind(geometry, buffers)


def _latent_groups(frames: int, *, first: bool) -> list[int]:
    """Return how many pixel frames make each latent, or raise :class:`InvalidRequest`."""
    rest = frames - 1 if first else frames
    if rest < 0 or rest % TEMPORAL_STRIDE or not frames:
        allowed = f"must be {'1 frame plus ' if first else ''}a multiple of {TEMPORAL_STRIDE} frames"
        raise InvalidRequest("video", f"{frames} frames", allowed)
    return [1] * first + [TEMPORAL_STRIDE] * (rest // TEMPORAL_STRIDE)


@lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation as float32 tensors, made once for each device, which making them waits for."""
    with torch.inference_mode(False):
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)
