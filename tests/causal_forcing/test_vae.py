"""The Wan autoencoder: parity with the reference, and what a streaming codec with explicit state must satisfy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from causal_forcing.config import VaeConfig
from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.geometry import Geometry, pixel_frames
from causal_forcing.vae import DecoderState, WanVae

TESTS = Path(__file__).parents[1]
GEOMETRY = Geometry(32, 48)


def tiny_vae(seed: int = 0, base_dim: int = 4) -> WanVae:
    torch.manual_seed(seed)
    vae = WanVae(VaeConfig(base_dim=base_dim)).requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    return vae


def random_latents(frames: int, geometry: Geometry = GEOMETRY, seed: int = 1) -> Tensor:
    return torch.randn(geometry.latent_shape(frames), generator=torch.Generator().manual_seed(seed))


def decode_in(vae: WanVae, latents: Tensor, split: list[int], state: DecoderState | None = None) -> Tensor:
    state = vae.new_decoder_state(GEOMETRY) if state is None else state
    return torch.cat([vae.decode_unclamped(part, state) for part in torch.split(latents, split, dim=2)], dim=2)


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return tiny_vae()


def test_any_split_of_latents_gives_the_same_bits(vae: WanVae) -> None:
    latents = random_latents(5)
    whole = decode_in(vae, latents, [5])
    assert whole.shape == (1, 3, pixel_frames(5, first=True), 32, 48)
    for split in ([1] * 5, [2, 1, 2], [1, 4], [4, 1]):
        assert torch.equal(decode_in(vae, latents, split), whole), split
