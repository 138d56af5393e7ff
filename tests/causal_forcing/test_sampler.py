"""The denoising loop: which draws and levels it uses, in which order, and when it asks whether to stop."""

import pytest
import torch

from causal_forcing.flow import warp_steps
from causal_forcing.noise import SeededNoise
from causal_forcing.sampler import DenoisingStep, Schedule, Stopped, denoise
from tests.causal_forcing.builders import make_transformer

SHAPE = (1, 16, 2, 4, 6)


def steps_of(*numbers):
    return [DenoisingStep(level, number) for level, number in zip(warp_steps(numbers), numbers, strict=True)]


def draw_noise(draw):
    return SeededNoise(0)(0, draw, SHAPE)


def test_a_perfect_model_is_followed_to_its_image():
    image = torch.full(SHAPE, 0.5)
    sigmas = dict(zip((1000, 750, 500), (level.sigma for level in warp_steps((1000, 750, 500))), strict=True))

    def perfect(x, number):
        return (x - image) / sigmas[number]

    torch.testing.assert_close(denoise(perfect, draw_noise, steps_of(1000, 750, 500)), image, atol=1e-6, rtol=0)


def test_it_equals_the_loop_written_out():
    def predict(x, number):
        return torch.tanh(x) * number / 1000

    x = draw_noise(0)
    x0 = x - 1.0 * predict(x, 1000)
    x = (1 - 0.9375) * x0 + 0.9375 * draw_noise(1)
    x0 = x - 0.9375 * predict(x, 750)
    x = (1 - 0.625) * x0 + 0.625 * draw_noise(2)
    expected = x - 0.625 * predict(x, 250)
    torch.testing.assert_close(denoise(predict, draw_noise, steps_of(1000, 750, 250)), expected, atol=1e-6, rtol=0)


def test_draws_and_steps_come_in_order():
    seen = []

    def predict(x, number):
        seen.append(f"step {number}")
        return x

    def draw(number):
        seen.append(f"draw {number}")
        return draw_noise(number)

    denoise(predict, draw, steps_of(1000, 500, 250))
    assert seen == ["draw 0", "step 1000", "draw 1", "step 500", "draw 2", "step 250"]


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_it_asks_before_every_step_and_stops_there(stop_at):
    asked, taken = [], []

    def should_stop():
        asked.append(len(taken))
        return len(taken) == stop_at

    def predict(x, number):
        taken.append(number)
        return x

    with pytest.raises(Stopped):
        denoise(predict, draw_noise, steps_of(1000, 500, 250), should_stop)
    assert taken == [1000, 500, 250][:stop_at]
    assert asked == list(range(stop_at + 1))


def test_a_schedule_holds_each_timestep_once_and_the_first_chunks_steps():
    transformer = make_transformer()
    schedule = Schedule.of(transformer, (1000, 500), (1000, 750, 500, 250))
    assert [step.level for step in schedule.steps] == list(warp_steps((1000, 500)))
    assert [step.level for step in schedule.first_steps] == list(warp_steps((1000, 750, 500, 250)))
    assert schedule.steps[1].modulation is schedule.first_steps[2].modulation
    for step in schedule.first_steps:
        assert torch.equal(step.modulation.blocks, transformer.modulate(step.level.timestep).blocks)
    assert torch.equal(schedule.context.blocks, transformer.modulate(0.0).blocks)


def test_without_its_own_steps_the_first_chunk_takes_the_others():
    schedule = Schedule.of(make_transformer(), (1000, 250), None)
    assert schedule.first_steps == schedule.steps


def test_steps_are_warped_by_the_models_shift():
    def sigmas(**shift):
        schedule = Schedule.of(make_transformer(), (1000, 750, 500, 250), None, **shift)
        return [step.level.sigma for step in schedule.steps]

    assert sigmas(shift=1.0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert sigmas() == pytest.approx([1, 0.9375, 5 / 6, 0.625])
