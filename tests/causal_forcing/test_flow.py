"""Noise levels and conversions, against the formulas in float64."""

import pytest
import torch

from causal_forcing.flow import TRAIN_STEPS, renoise, sigma_table, timestep_table, to_x0, warp_steps


def test_the_table_is_the_shifted_line():
    u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(sigma_table().double(), 5 * u / (1 + 4 * u), atol=1e-6, rtol=0)
    assert sigma_table().dtype == torch.float32
    assert torch.equal(timestep_table(), sigma_table() * TRAIN_STEPS)
    assert sigma_table()[-1] == pytest.approx(0.00498008, abs=1e-8)


def test_warped_steps_are_the_references():
    levels = warp_steps((1000, 750, 500, 250))
    assert [level.timestep for level in levels] == [1000.0, 937.5, 833.3333129882812, 625.0]
    assert [level.sigma for level in levels] == [1.0, 0.9375, 0.8333333134651184, 0.625]


def test_every_step_is_its_row_of_the_table():
    levels = warp_steps(range(1000, 0, -1))
    assert [level.sigma for level in levels] == sigma_table().tolist()


def test_x0_undoes_noising():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 16, 3, 4, 6, generator=generator)
    for level in warp_steps((1000, 500, 1)):
        torch.testing.assert_close(
            to_x0(renoise(x0, noise, level.sigma), noise - x0, level.sigma), x0, atol=2e-6, rtol=0
        )


def test_full_noise_is_the_noise_and_none_is_the_image():
    x0, noise = torch.randn(2, 1, 16, 1, 4, 6)
    assert torch.equal(renoise(x0, noise, 1.0), noise)
    assert torch.equal(renoise(x0, noise, 0.0), x0)


def test_bfloat16_latents_are_computed_wide_and_rounded_once():
    x, velocity = torch.randn(2, 1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    sigma = warp_steps((500,))[0].sigma
    assert torch.equal(to_x0(x, velocity, sigma), (x.double() - sigma * velocity.double()).bfloat16())
    assert torch.equal(renoise(x, velocity, sigma), ((1 - sigma) * x.float() + sigma * velocity.float()).bfloat16())
