"""What a VAE is said to allocate is what decoding and encoding allocate on the meta device, and allocated on a GPU."""

import json
from pathlib import Path

import pytest
import torch

from causal_forcing.geometry import Geometry, pixel_frames
from causal_forcing.presets import get_preset
from causal_forcing.weights.loading import build_vae
from causal_forcing.weights.memory import required_bytes
from causal_forcing.weights.working_set import decoding_bytes, encoding_bytes
from tests.counting import META, AllocationMeter

FRAMEWISE = get_preset("causal-forcing-framewise")
REPOSITORY = Path(__file__).parents[3]
CASES = [
    pytest.param(FRAMEWISE.vae_config(vae), Geometry(480, 832), torch.bfloat16, id=f"{vae} at full size")
    for vae in ("wan", "lightvae", "tae")
]
CASES.append(pytest.param(get_preset("tiny").vae_config("wan"), Geometry(64, 64), torch.float32, id="tiny"))


def decode(vae, geometry, dtype, latent_frames, calls=2):
    """Return the most that a scene's first calls allocate at a time, beside weights and state."""
    state = vae.new_decoder_state(geometry)
    latents = torch.empty(geometry.latent_shape(latent_frames), dtype=dtype, device=META)
    meter = AllocationMeter()
    with torch.inference_mode(), meter:
        for _ in range(calls):
            vae.decode(latents, state)
    return meter.peak_bytes


def encode(vae, geometry, dtype, latent_frames):
    """Return the most that encoding a video allocates at a time, beside weights; its state and itself included."""
    video = torch.empty(
        (1, 3, pixel_frames(latent_frames, first=True), geometry.height, geometry.width), dtype=dtype, device=META
    )
    meter = AllocationMeter()
    with torch.inference_mode(), meter:
        vae.encode(video)
    return video.nbytes + meter.peak_bytes


@pytest.mark.parametrize(("sizes", "geometry", "dtype"), CASES)
@pytest.mark.parametrize("latent_frames", [1, 2])
def test_decoding_allocates_what_is_planned(sizes, geometry, dtype, latent_frames):
    vae = build_vae(sizes)[0].to(dtype)
    planned = decoding_bytes(sizes, geometry, dtype, latent_frames)
    assert 0.97 * planned < decode(vae, geometry, dtype, latent_frames) <= planned


@pytest.mark.parametrize(("sizes", "geometry", "dtype"), CASES)
@pytest.mark.parametrize("latent_frames", [1, 2])
def test_encoding_allocates_what_is_planned(sizes, geometry, dtype, latent_frames):
    vae = build_vae(sizes)[0].to(dtype)
    planned = encoding_bytes(sizes, geometry, dtype, latent_frames)
    assert 0.97 * planned < encode(vae, geometry, dtype, latent_frames) <= planned


def test_many_latent_frames_take_their_pixels_and_no_more_work():
    sizes, geometry, dtype = FRAMEWISE.vae_config("tae"), Geometry(480, 832), torch.bfloat16
    vae = build_vae(sizes)[0].to(dtype)
    planned = decoding_bytes(sizes, geometry, dtype, 20)
    assert 0.95 * planned < decode(vae, geometry, dtype, 20, calls=1) <= planned
    planned = encoding_bytes(sizes, geometry, dtype, 20)
    assert 0.97 * planned < encode(vae, geometry, dtype, 20) <= planned


def test_a_gpu_took_what_is_planned():
    path = REPOSITORY / "benchmarks" / "results" / "gpu_check.json"
    measured = json.loads(path.read_text())["sections"]["memory"]["result"]
    plan = required_bytes(FRAMEWISE, "wan", FRAMEWISE.session_config(), torch.bfloat16, text_encoder=False)
    for peak in ("peak_of_chunk_bytes", "peak_of_decode_bytes"):
        assert measured[peak] < plan.needed_bytes
    assert plan.total_bytes == pytest.approx(measured["peak_of_decode_bytes"], rel=0.005)
