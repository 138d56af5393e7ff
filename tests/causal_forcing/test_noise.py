"""Noise: a pure function of seed, chunk and draw."""

import torch

from causal_forcing.config import MAX_SEED
from causal_forcing.noise import SeededNoise

SHAPE = (1, 16, 3, 4, 6)


def test_the_same_draw_is_the_same_in_any_order():
    places = [(chunk, draw) for chunk in (0, 1, 2, 1000, 10**9) for draw in range(4)]
    forwards = {place: SeededNoise(7)(*place, SHAPE) for place in places}
    noise = SeededNoise(7)
    for place in reversed(places):
        assert torch.equal(noise(*place, SHAPE), forwards[place])


def test_every_seed_chunk_and_draw_has_its_own_noise():
    draws = [SeededNoise(seed)(chunk, draw, SHAPE) for seed in (0, 1, MAX_SEED) for chunk in (0, 1) for draw in (0, 1)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float((a * b).mean())) < 0.2  # uncorrelated: 1152 samples, so 7 standard deviations


def test_it_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = SeededNoise(3)(0, 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(SeededNoise(3)(0, 0, SHAPE), a)


def test_it_is_standard_normal_float32_on_the_cpu():
    sample = SeededNoise(0)(5, 1, (1, 16, 3, 60, 104))
    assert sample.dtype == torch.float32
    assert sample.device.type == "cpu"
    assert abs(float(sample.mean())) < 0.01
    assert abs(float(sample.std()) - 1) < 0.01
    assert 0.994 < float((sample.abs() < 3).float().mean()) < 0.9995


def test_the_numbers_are_pinned():
    """A record is restored with this noise: it may never change for a seed."""
    first = SeededNoise(42)(3, 1, (1, 16, 1, 2, 2)).flatten()[:4]
    pinned = torch.tensor([0.52896446, -1.68660462, -0.76005119, 0.05279401])
    torch.testing.assert_close(first, pinned, atol=1e-6, rtol=0)
