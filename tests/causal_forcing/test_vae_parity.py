"""The Wan autoencoder against the reference, real checkpoints' names, another implementation, and arithmetic."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from causal_forcing.config import VaeConfig
from causal_forcing.geometry import Geometry
from causal_forcing.vae import WanVae
from causal_forcing.weights.keys import VaeDiffusersNaming

TESTS = Path(__file__).parents[1]
FULL = Geometry(480, 832)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
    with safe_open(TESTS / "golden" / "vae_stream.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is not iterable)
        return tensors, json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def reference(golden):
    tensors, sizes = golden
    config = VaeConfig(
        base_dim=sizes["dim"],
        latent_mean=tuple(tensors["latent_mean"].tolist()),
        latent_std=tuple(tensors["latent_std"].tolist()),
    )
    with torch.device("meta"):
        vae = WanVae(config)
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    vae.load_state_dict(weights, assign=True)
    return vae.requires_grad_(False)


def on_meta(base_dim):
    with torch.device("meta"):
        return WanVae(VaeConfig(base_dim=base_dim)).requires_grad_(False)


def test_decoding_matches_the_reference(golden, reference):
    latents, pixels = golden[0]["latent"], golden[0]["pixels"]
    state = reference.new_decoder_state(Geometry(*pixels.shape[-2:]))
    error = (reference.decode_unclamped(latents, state) - pixels).abs().max()
    assert error < TOLERANCE


def test_encoding_matches_the_reference(golden, reference):
    video = golden[0]["video"]
    assert (reference.encode(video) - golden[0]["video_latent"]).abs().max() < TOLERANCE
    assert (reference.encode(video[:, :, :1]) - golden[0]["image_latent"]).abs().max() < TOLERANCE


def test_bfloat16_is_close_to_float32(golden, reference):
    latents, pixels = golden[0]["latent"], golden[0]["pixels"]
    vae = copy.deepcopy(reference).to(torch.bfloat16)
    state = vae.new_decoder_state(Geometry(*pixels.shape[-2:]))
    decoded = vae.decode_unclamped(latents.bfloat16(), state)
    assert all(buffer.dtype == torch.bfloat16 for buffer in state.buffers.values())
    assert decoded.dtype == torch.float32
    relative = (decoded - pixels).square().mean().sqrt() / pixels.std()
    assert 1e-4 < relative < 0.05


@pytest.mark.parametrize(
    ("manifest", "base_dim"), [("wan2.1_vae_original", 96), ("lightvae_2.1_original_pruned75", 24)]
)
def test_names_and_shapes_are_those_of_the_checkpoint(manifest, base_dim):
    expected = json.loads((TESTS / "manifests" / f"{manifest}.json").read_text())
    ours = {name: list(tensor.shape) for name, tensor in on_meta(base_dim).state_dict().items()}
    assert ours == {name: shape for name, (_, shape) in expected.items()}


def test_the_state_at_full_size_is_what_the_arithmetic_says():
    vae = on_meta(96)
    decoder = vae.new_decoder_state(FULL, dtype=torch.bfloat16)
    assert len(decoder.buffers) == 32
    # Two frames of each convolution's input; 6240 latent pixels, 2 bytes a value.
    low = 16 + 10 * 384 + 384
    half = 192 + 5 * 384 + 384
    quarter, full = 6 * 192, 7 * 96
    assert decoder.nbytes == 2 * 2 * 6240 * (low + 4 * half + 16 * quarter + 64 * full)
    assert round(decoder.nbytes / 1e9, 3) == 1.889
    assert len(vae.new_encoder_state(FULL).buffers) == 24
    light = on_meta(24).new_decoder_state(FULL, dtype=torch.bfloat16)
    assert round(light.nbytes / 1e6) == 472


def test_weights_lie_in_memory_as_the_convolutions_read_them(reference):
    moved = copy.deepcopy(reference).to(torch.bfloat16)
    for vae in (reference, moved, WanVae(VaeConfig(base_dim=2))):
        weight = vae.get_parameter("decoder.middle.0.residual.2.weight")
        folded = weight.transpose(1, 2).flatten(1, 2)
        assert folded.data_ptr() == weight.data_ptr()
        assert folded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("base_dim", "reference_teraflops"), [(96, 13.550), (24, 0.863)])
def test_a_latent_costs_no_more_than_the_mathematics(base_dim, reference_teraflops):
    vae = on_meta(base_dim)
    state = vae.new_decoder_state(FULL)
    vae.decode(torch.empty(FULL.latent_shape(1), device="meta"), state)
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.empty(FULL.latent_shape(1), device="meta"), state)
    # The doubling convolutions take 4/9 of what the reference spends on them: about 4.6 % of the whole.
    assert 0.94 < counter.get_total_flops() / 1e12 / reference_teraflops < 0.96


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still alive, also on the meta device."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        given = {t.untyped_storage()._cdata for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)}
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor)
        return result

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), size
        self._seen = {key: (ref, n) for key, (ref, n) in self._seen.items() if not ref.expired()}
        self.live = sum(n for _, n in self._seen.values())
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize("latents", [1, 3])
def test_decoding_holds_the_activations_of_one_block_of_one_frame(latents):
    vae = on_meta(96).to(torch.bfloat16)
    state = vae.new_decoder_state(FULL)
    vae.decode(torch.empty(FULL.latent_shape(1), device="meta"), state)
    with PeakBytes() as memory:
        vae.decode(torch.empty(FULL.latent_shape(latents), device="meta"), state)
    frame = FULL.height * FULL.width * 96 * 2
    output = 4 * latents * FULL.height * FULL.width * 3 * 4
    # A block of the last stage: its input, that normalised, three frames side by side, the result; and what waits for
    # the next frames of earlier stages.
    assert memory.peak < 8 * frame + 3 * output


@pytest.fixture(scope="module")
def diffusers_pair():
    """The same random weights in diffusers' AutoencoderKLWan, which convolves in three dimensions."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is a development dependency")
    torch.manual_seed(0)
    ours = WanVae(VaeConfig(base_dim=8)).requires_grad_(False)
    theirs = diffusers.AutoencoderKLWan(base_dim=8)
    naming = VaeDiffusersNaming()
    theirs.load_state_dict({naming.to_file(name): tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs.requires_grad_(False)


def statistics(vae):
    return (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latent_mean, vae.config.latent_std))


def test_decoding_equals_diffusers(diffusers_pair):
    ours, theirs = diffusers_pair
    latents = torch.randn(1, 16, 4, 4, 6)
    mean, std = statistics(ours)
    expected = theirs.decode(latents * std + mean).sample
    decoded = ours.decode(latents, ours.new_decoder_state(Geometry(32, 48)))
    assert decoded.std() > 0.01
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-4)


def test_encoding_equals_diffusers(diffusers_pair):
    ours, theirs = diffusers_pair
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    mean, std = statistics(ours)
    expected = (theirs.encode(video).latent_dist.mean - mean) / std
    torch.testing.assert_close(ours.encode(video), expected, atol=1e-5, rtol=1e-4)
