"""Rotary embedding: against complex numbers in float64, and the same at any position."""

import pytest
import torch

from causal_forcing.config import TransformerConfig
from causal_forcing.geometry import Geometry
from causal_forcing.rope import RotaryEmbedding, rotate
from tests.causal_forcing.naive import turns

CONFIG = TransformerConfig(dim=256, ffn_dim=8, num_heads=2, num_layers=1)  # heads of 128, as in the real model
GEOMETRY = Geometry(64, 96)  # 4 x 6 tokens
TOKENS = GEOMETRY.tokens_per_frame


def rotary():
    return RotaryEmbedding(CONFIG, GEOMETRY, torch.device("cpu"))


def heads(seed, frames=1):
    return torch.randn(1, frames * TOKENS, 2, 128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("position", [0, 1, 20, 1023, 1024, 100_000, 2_000_000])
def test_it_is_complex_multiplication(position):
    x = heads(0)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (64, 2)))
    expected = torch.view_as_real(pairs * turns(position, TOKENS, 6, 64)).flatten(-2)
    ours = rotate(x, rotary().rotation([position]))
    torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shift", [1_024, 100_000, 2_000_000])
@pytest.mark.parametrize("distance", [0, 1, 20])
def test_scores_depend_on_the_distance_alone(distance, shift):
    q, k = heads(1)[0].transpose(0, 1), heads(2)[0].transpose(0, 1)

    def scores(base):
        turned_q = rotate(q.transpose(0, 1)[None], rotary().rotation([base + distance]))[0].transpose(0, 1)
        turned_k = rotate(k.transpose(0, 1)[None], rotary().rotation([base]))[0].transpose(0, 1)
        return turned_q @ turned_k.transpose(1, 2) / 128**0.5

    torch.testing.assert_close(scores(shift), scores(0), atol=1e-5, rtol=0)


def test_distances_in_time_row_and_column_all_show():
    x = heads(3)[:, :1].expand(1, 2 * TOKENS, 2, 128)
    turned = rotate(x, rotary().rotation([4, 5]))
    first = turned[:, :1]
    for other in (1, 6, TOKENS):  # next column, next row, next frame
        assert float((turned[:, other : other + 1] - first).abs().max()) > 0.1


def test_frames_of_one_call_are_as_if_each_were_alone():
    x = heads(4, frames=3)
    together = rotate(x, rotary().rotation([7, 8, 1024]))
    alone = [rotate(x[:, i * TOKENS : (i + 1) * TOKENS], rotary().rotation([p])) for i, p in enumerate((7, 8, 1024))]
    assert torch.equal(together, torch.cat(alone, dim=1))


def test_it_keeps_dtype_and_length():
    x = heads(5).bfloat16()
    turned = rotate(x, rotary().rotation([9]))
    assert turned.dtype == torch.bfloat16
    wide = rotate(x.float(), rotary().rotation([9]))
    torch.testing.assert_close(turned, wide.bfloat16(), atol=0, rtol=0)
    torch.testing.assert_close(wide.norm(dim=-1), x.float().norm(dim=-1))


def test_position_zero_of_time_turns_nothing_in_the_corner_token():
    x = heads(6)
    assert torch.equal(rotate(x, rotary().rotation([0]))[:, 0], x[:, 0])
