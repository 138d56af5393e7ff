"""The tiny autoencoders against a direct statement of what they compute; their streaming is tested with the others'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from causal_forcing.config import TinyVaeConfig
from causal_forcing.geometry import Geometry
from causal_forcing.vae import TinyVae

GEOMETRY = Geometry(32, 48)
FULL = Geometry(480, 832)
SMALL = (16, 12, 8, 8)


def build(**config):
    torch.manual_seed(0)
    vae = TinyVae(TinyVaeConfig(**{"channels": SMALL, **config})).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.mul_(1.5)
    return vae


class Naive:
    """Whole clips ``[T, C, H, W]`` through the public file's sequence, layer by layer, with weights found by name."""

    def __init__(self, vae):
        self.weights = vae.state_dict()

    def conv(self, x, name, **options):
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **options)

    def memory(self, x, name):
        before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        hidden = F.relu(self.conv(torch.cat((x, before), 1), f"{name}.conv.0"))
        hidden = F.relu(self.conv(hidden, f"{name}.conv.2"))
        return F.relu(self.conv(hidden, f"{name}.conv.4") + x)

    def decode(self, latents):
        x = F.relu(self.conv(3 * torch.tanh(latents / 3), "decoder.1"))
        for start, factor in ((3, 1), (9, 2), (15, 2)):
            for block in range(start, start + 3):
                x = self.memory(x, f"decoder.{block}")
            x = self.conv(F.interpolate(x, scale_factor=2), f"decoder.{start + 4}.conv")
            x = x.reshape(factor * x.shape[0], -1, *x.shape[2:])
            x = self.conv(x, f"decoder.{start + 5}")
        return self.conv(F.relu(x), "decoder.22")

    def encode(self, video):
        x = F.relu(self.conv(video, "encoder.0"))
        for start, factor in ((2, 2), (7, 2), (12, 1)):
            x = self.conv(x.reshape(x.shape[0] // factor, -1, *x.shape[2:]), f"encoder.{start}.conv")
            x = self.conv(x, f"encoder.{start + 1}", stride=2)
            for block in range(start + 2, start + 5):
                x = self.memory(x, f"encoder.{block}")
        return self.conv(x, "encoder.17")


def test_decoding_equals_the_plain_sequence_without_its_first_three_frames():
    vae, latents = build(), torch.randn(GEOMETRY.latent_shape(4))
    decoded = vae.decode_unclamped(latents, vae.new_decoder_state(GEOMETRY))
    expected = Naive(vae).decode(latents[0].transpose(0, 1)).transpose(0, 1)[:, 3:]
    assert decoded.shape == (1, 3, 13, 32, 48)
    assert expected.std() > 0.01
    torch.testing.assert_close(decoded[0], 2 * expected - 1, atol=1e-5, rtol=1e-4)


def test_encoding_repeats_the_first_frame_so_that_it_fills_a_latent():
    vae, video = build(), torch.rand(1, 3, 9, 32, 48) * 2 - 1
    frames = video[0].transpose(0, 1)
    full = torch.cat((frames[:1], frames[:1], frames[:1], frames))
    expected = Naive(vae).encode((full + 1) / 2).transpose(0, 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(vae.encode(video)[0], expected, atol=1e-5, rtol=1e-4)


def test_lighttae_takes_raw_latents():
    tae, lighttae = build(), build(takes_normalised_latents=False)
    latents = torch.randn(GEOMETRY.latent_shape(2))
    mean = torch.tensor(tae.config.latent_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(tae.config.latent_std).view(1, -1, 1, 1, 1)
    raw = tae.decode_unclamped(latents * std + mean, tae.new_decoder_state(GEOMETRY))
    assert torch.equal(lighttae.decode_unclamped(latents, lighttae.new_decoder_state(GEOMETRY)), raw)
    video = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    torch.testing.assert_close(lighttae.encode(video), (tae.encode(video) - mean) / std)


def test_latents_are_limited_softly():
    vae = build()
    far, further = (
        vae.decode_unclamped(torch.full(GEOMETRY.latent_shape(1), value), vae.new_decoder_state(GEOMETRY))
        for value in (60.0, 600.0)
    )
    assert torch.equal(far, further)


def test_names_shapes_and_sizes_are_those_of_the_public_file():
    with torch.device("meta"):
        vae = TinyVae(TinyVaeConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert sum(p.numel() for p in vae.parameters()) == 11_315_539
    assert sum(p.numel() for p in vae.decoder.parameters()) == 9_844_611
    expected = {
        "decoder.1.weight": (256, 16, 3, 3),
        "decoder.3.conv.0.weight": (256, 512, 3, 3),
        "decoder.5.conv.4.bias": (256,),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.bias": (3,),
        "encoder.2.conv.weight": (64, 128, 1, 1),
        "encoder.12.conv.weight": (64, 64, 1, 1),
        "encoder.17.weight": (16, 64, 3, 3),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    without_bias = {"decoder.7.conv", "decoder.8", "decoder.14", "decoder.20", "encoder.3", "encoder.7.conv"}
    assert not {f"{name}.bias" for name in without_bias} & shapes.keys()


@pytest.mark.parametrize(("dtype", "expected_bytes"), [(torch.bfloat16, 67_092_480), (torch.float32, 134_184_960)])
def test_the_state_is_nine_frames(dtype, expected_bytes):
    with torch.device("meta"):
        state = TinyVae(TinyVaeConfig()).new_decoder_state(FULL, dtype=dtype)
    assert len(state.buffers) == 9
    # Three blocks each at 60x104 with 256 channels, twice that with 128, four times that with 64.
    assert state.nbytes == 3 * 60 * 104 * (256 + 4 * 128 + 16 * 64) * dtype.itemsize == expected_bytes


def test_a_latent_costs_less_than_the_public_code_spends():
    with torch.device("meta"):
        vae = TinyVae(TinyVaeConfig())
        state = vae.new_decoder_state(FULL)
        latents = torch.empty(FULL.latent_shape(1))
    vae.decode(latents, state)
    with FlopCounterMode(display=False) as counter:
        vae.decode(latents, state)
    # It spends 0.544 TFLOP, enlarging every frame before it is mapped and convolved.
    assert 0.80 < counter.get_total_flops() / 0.544e12 < 0.81
