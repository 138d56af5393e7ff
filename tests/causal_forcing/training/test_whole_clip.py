"""The training pass of the VAE computes what the streaming VAE computes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from causal_forcing.config import VaeConfig
from causal_forcing.geometry import Geometry
from causal_forcing.training import whole_clip
from causal_forcing.vae import WanVae

UNIT = {"latent_mean": (0.0,) * 16, "latent_std": (1.0,) * 16}


def random_parameters(config):
    generator = torch.Generator().manual_seed(0)
    shapes = whole_clip.parameter_shapes(config)
    return {n: (n.endswith("gamma") + 0.15 * torch.randn(s, generator=generator)) for n, s in shapes.items()}


@pytest.mark.parametrize("blocks", [1, 2])
@torch.no_grad()
def test_equals_the_streaming_vae(blocks):
    config = VaeConfig(base_dim=4, num_res_blocks=blocks, **UNIT)
    parameters = random_parameters(config)
    vae = WanVae(config)
    vae.load_state_dict(parameters, strict=True)
    video = torch.rand(2, 3, 13, 32, 32) * 2 - 1
    mean, _ = whole_clip.encode(parameters, config, video)
    streamed = torch.cat([vae.encode(clip[None]) for clip in video])
    torch.testing.assert_close(mean, streamed, atol=1e-4, rtol=1e-4)
    drawn = whole_clip.decode(parameters, config, mean)
    decoded = [vae.decode_unclamped(z[None], vae.new_decoder_state(Geometry(32, 32))) for z in streamed]
    torch.testing.assert_close(drawn, torch.cat(decoded), atol=1e-4, rtol=1e-4)


def test_shapes_are_those_of_the_real_vae():
    manifests = sorted((Path(__file__).parents[2] / "golden").rglob("wan2.1_vae_original.json"))
    shapes = whole_clip.parameter_shapes(VaeConfig())
    for path in manifests:
        assert shapes == {name: tuple(shape) for name, (_, shape) in json.loads(path.read_text()).items()}
    assert len(shapes) == 194


def test_more_frames_do_not_change_the_past():
    config = VaeConfig(base_dim=4, num_res_blocks=1, **UNIT)
    parameters = random_parameters(config)
    video = torch.rand(1, 3, 13, 16, 16)
    with torch.no_grad():
        long, _ = whole_clip.encode(parameters, config, video)
        short, _ = whole_clip.encode(parameters, config, video[:, :, :9])
    torch.testing.assert_close(long[:, :, :3], short, atol=1e-5, rtol=1e-5)


def test_initial_parameters_are_seeded():
    config = dataclasses.replace(VaeConfig(base_dim=4), num_res_blocks=1)
    first, again = whole_clip.initial_parameters(config, 1), whole_clip.initial_parameters(config, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)


@torch.no_grad()
def test_a_deeper_vae_begins_with_what_a_shallower_one_does():
    shallow, deep = (VaeConfig(base_dim=4, num_res_blocks=blocks, **UNIT) for blocks in (1, 3))
    parameters = random_parameters(shallow)
    deepened = whole_clip.deepened(parameters, deep, 1)
    assert {name: tuple(value.shape) for name, value in deepened.items()} == whole_clip.parameter_shapes(deep)
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    mean, _ = whole_clip.encode(parameters, shallow, video)
    torch.testing.assert_close(whole_clip.encode(deepened, deep, video)[0], mean)
    torch.testing.assert_close(whole_clip.decode(deepened, deep, mean), whole_clip.decode(parameters, shallow, mean))
    same = whole_clip.deepened(parameters, shallow, 1)
    assert all(torch.equal(same[name], value) for name, value in parameters.items())
    for other in (deepened, random_parameters(dataclasses.replace(shallow, base_dim=2))):
        with pytest.raises(ValueError, match="no VAE of width 4 and 1 blocks"):
            whole_clip.deepened(other, shallow, 1)


@torch.no_grad()
def test_folding_time_into_channels_changes_nothing(monkeypatch):
    config = VaeConfig(base_dim=4, num_res_blocks=1, **UNIT)
    parameters = random_parameters(config)
    video = torch.rand(2, 3, 13, 32, 32) * 2 - 1
    mean, _ = whole_clip.encode(parameters, config, video)
    drawn = whole_clip.decode(parameters, config, mean)
    monkeypatch.setattr(whole_clip, "_folds", lambda _x: True)
    folded, _ = whole_clip.encode(parameters, config, video)
    torch.testing.assert_close(folded, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole_clip.decode(parameters, config, folded), drawn, atol=1e-4, rtol=1e-4)
