"""What sessions of the real models hold at 480x832 in bfloat16, and what a chunk needs beside it."""

import pytest
import torch

from causal_forcing.kv_cache import LayerMemory
from tests.causal_forcing.full_size import CHUNKWISE, FRAMEWISE, open_full_size_session
from tests.counting import AllocationMeter

BFLOAT16 = 2
LATENT_PIXELS = 60 * 104
TOKENS = 1560
FEW_LAYERS = 2


def wan_decoder_bytes():
    """The last two frames of what each temporal convolution of the published decoder read (model_spec section 4.2).

    By resolution, as a multiple of a latent frame's: the channels that each convolution there reads, first to last.
    """
    pixels = {1: LATENT_PIXELS, 2: 4 * LATENT_PIXELS, 4: 16 * LATENT_PIXELS, 8: 64 * LATENT_PIXELS}
    channels_read = {
        1: [16, *[384] * 4, *[384] * 6, 384],  # first convolution, two blocks in the middle, three after, upsampling
        2: [192, *[384] * 5, 384],  # a block from 192 channels, two blocks, upsampling
        4: [192] * 6,  # three blocks
        8: [96] * 7,  # three blocks, and the last convolution
    }
    return 2 * BFLOAT16 * sum(pixels[scale] * sum(channels) for scale, channels in channels_read.items())


def test_session_state_is_the_arithmetic():
    session = open_full_size_session(held_frames=0, vae=True)
    parts = session.state.nbytes_by_part()
    assert parts["self_attention"] == 2 * 30 * 21 * TOKENS * 1536 * BFLOAT16 == 6_038_323_200
    assert parts["cross_attention"] == 2 * 30 * 512 * 1536 * BFLOAT16 == 94_371_840
    assert parts["decoder"] == wan_decoder_bytes()
    assert parts["decoder"] == pytest.approx(1.889e9, rel=0.001)
    assert parts["latents"] == 16 * LATENT_PIXELS * BFLOAT16
    assert session.nbytes == sum(parts.values())


def peak_beside_weights_and_state(session):
    """Bytes that one chunk allocates at most."""
    meter = AllocationMeter()
    with meter:
        session.generate_chunk()
    return meter.peak_bytes


def block_bytes(session):
    """One block's activations: the most that is alive in it at once, in the middle of its feed-forward layer.

    Per token: the block's input, the residual stream after attention, the normed input of the layer, and its inner
    activations before and after GELU.
    """
    config, tokens = session.engine.transformer.config, session.engine.preset.chunk_frames * TOKENS
    return tokens * (3 * config.dim + 2 * config.ffn_dim) * BFLOAT16


def weight_bytes(session):
    return sum(parameter.nbytes for parameter in session.engine.transformer.parameters())


@pytest.mark.parametrize("name", [FRAMEWISE, CHUNKWISE])
def test_a_chunk_needs_weights_state_and_one_blocks_activations(name):
    """In two layers, so that neither weights nor state hide anything; what a chunk adds does not depend on depth."""
    session = open_full_size_session(name, layers=FEW_LAYERS, held_frames=63)
    peak = peak_beside_weights_and_state(session)
    assert peak == pytest.approx(block_bytes(session), rel=0.05)
    fixed = weight_bytes(session) + session.nbytes
    assert fixed + peak == pytest.approx(fixed + block_bytes(session), rel=0.05)


@pytest.mark.slow
def test_depth_adds_nothing():
    peaks = [peak_beside_weights_and_state(open_full_size_session(layers=layers)) for layers in (2, 30)]
    assert peaks[0] == peaks[1]


def test_a_planted_copy_of_one_layers_window_is_found(monkeypatch):
    session = open_full_size_session(layers=FEW_LAYERS)
    original = LayerMemory.read

    def read(self, plan):
        return tuple(tensor.clone() for tensor in original(self, plan))

    monkeypatch.setattr(LayerMemory, "read", read)
    assert peak_beside_weights_and_state(session) > 2 * block_bytes(session)


def test_the_meter_counts_what_is_alive():
    meter = AllocationMeter()
    with meter:
        first = torch.empty(100, dtype=torch.float32, device="meta")
        view = first[10:]
        del first
        second = view + 1
        assert meter.live_bytes == 400 + 360
        del view
        assert meter.live_bytes == 360
        second.add_(1)
        assert meter.peak_bytes == 760
