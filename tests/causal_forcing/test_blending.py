"""Mixing embeddings, against the formulas written out by hand."""

import pytest
import torch

from causal_forcing.blending import NEGLIGIBLE_CHANGE, blend, interpolate, is_negligible
from causal_forcing.prompts import Blend
from tests.causal_forcing.builders import embedding
from tests.causal_forcing.naive import slerp_by_hand

A, B, C = (embedding(name).embeds for name in ("a", "b", "c"))


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (0.2, 0.5), (1, 0), (1e-9, 1e-9), (1e6, 1e6)])
def test_linear_blend_is_the_weighted_sum_at_the_weighted_norm(weights):
    w = [x / sum(weights) for x in weights]
    mixed = w[0] * A.double() + w[1] * B.double()
    norm = w[0] * A.double().norm() + w[1] * B.double().norm()
    torch.testing.assert_close(blend([A, B], weights).double(), mixed * norm / mixed.norm(), atol=1e-5, rtol=0)


def test_linear_blend_of_three():
    mixed = (A.double() + 2 * B.double() + C.double()) / 4
    norm = (A.double().norm() + 2 * B.double().norm() + C.double().norm()) / 4
    torch.testing.assert_close(blend([A, B, C], [1, 2, 1]).double(), mixed * norm / mixed.norm(), atol=1e-5, rtol=0)


def test_one_prompt_is_itself_whatever_its_weight():
    assert torch.equal(blend([A], [0.3]), A)


def test_slerp_blend_goes_the_second_prompts_share_of_the_way():
    expected = slerp_by_hand(A, B, 0.75)
    torch.testing.assert_close(blend([A, B], [1, 3], Blend.SLERP).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_interpolation_is_the_formula(t):
    line = A.double() + t * (B.double() - A.double())
    torch.testing.assert_close(interpolate(A, B, t).double(), line, atol=1e-6, rtol=0)
    arc = slerp_by_hand(A, B, t)
    torch.testing.assert_close(interpolate(A, B, t, Blend.SLERP).double(), arc, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", list(Blend))
def test_the_ends_are_exact(method):
    assert torch.equal(interpolate(A, B, 0.0, method), A)
    assert torch.equal(interpolate(A, B, 1.0, method), B)


def test_slerp_of_unit_rows_stays_on_the_sphere():
    a, b = A[:, :-1], B[:, :-1]
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    norms = interpolate(a, b, 0.3, Blend.SLERP).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("other", [A, A * (1 + 1e-7), -A, -2 * A, torch.zeros_like(A)], ids=range(5))
def test_slerp_never_blows_up(other):
    middle = interpolate(A, other, 0.5, Blend.SLERP)
    assert torch.isfinite(middle).all()
    assert float(middle.norm()) <= float(A.norm() + other.norm())


def test_small_changes_are_negligible():
    step = torch.zeros_like(A)
    step[0, 0, 0] = NEGLIGIBLE_CHANGE
    assert is_negligible(A, A + 0.9 * step)
    assert not is_negligible(A, A + 1.1 * step)


@pytest.mark.parametrize(
    ("embeds", "weights", "method"),
    [([A, B], [1], "linear"), ([], [], "linear"), ([A, B], [0, 0], "linear"), ([A, B, C], [1, 1, 1], "slerp")],
)
def test_a_programmers_mistake_is_a_value_error(embeds, weights, method):
    with pytest.raises(ValueError, match="embeddings|weights"):
        blend(embeds, weights, Blend(method))
