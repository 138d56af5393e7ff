"""Few-step denoising of one chunk.

Source: Causal Forcing (arXiv 2602.02214) and its public inference loop, thu-ml/Causal-Forcing@1fc7bbc.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from causal_forcing.config import DEFAULT_SHIFT
from causal_forcing.flow import CONTEXT_TIMESTEP, NoiseLevel, renoise, to_x0, warp_steps
from causal_forcing.transformer import CausalTransformer, TimestepModulation


class Stopped(Exception):
    """Raised between two denoising steps because the caller no longer wants the chunk; nothing was committed."""


@dataclass(frozen=True)
class DenoisingStep:
    """One forward pass of the sampler.

    Attributes:
        level: Its noise level.
        modulation: What the transformer makes of its timestep.
    """

    level: NoiseLevel
    modulation: TimestepModulation


@dataclass(frozen=True)
class Schedule:
    """Every pass a session can run, with the time projections computed once.

    Attributes:
        steps: Of an ordinary chunk.
        first_steps: Of the first chunk of a scene.
        context: Modulation of the context pass at timestep 0.
    """

    steps: tuple[DenoisingStep, ...]
    first_steps: tuple[DenoisingStep, ...]
    context: TimestepModulation

    @classmethod
    def of(
        cls,
        transformer: CausalTransformer,
        steps: Sequence[int],
        first_steps: Sequence[int] | None,
        *,
        shift: float = DEFAULT_SHIFT,
    ) -> Schedule:
        """Return the schedule of unwarped denoising steps.

        Args:
            transformer: Whose time projections to take.
            steps: E.g. (1000, 750, 500, 250).
            first_steps: Of the first chunk of a scene; None for the same.
            shift: Timestep shift that the model was trained with.
        """
        levels = {level.timestep: level for level in warp_steps((*steps, *(first_steps or ())), shift)}
        made = {t: DenoisingStep(level, transformer.modulate(t)) for t, level in levels.items()}

        def build(numbers: Sequence[int]) -> tuple[DenoisingStep, ...]:
            return tuple(made[level.timestep] for level in warp_steps(numbers, shift))

        return cls(build(steps), build(first_steps or steps), transformer.modulate(CONTEXT_TIMESTEP))


def denoise(
    predict_velocity: Callable[[Tensor, TimestepModulation], Tensor],
    draw_noise: Callable[[int], Tensor],
    steps: Sequence[DenoisingStep],
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Return clean latents: predict the clean chunk, noise it to the next level, and so on.

    Args:
        predict_velocity: The transformer with a session's memory bound; called once per step, commits nothing.
        draw_noise: Noise of one draw, in the latents' shape and dtype; draw 0 is where the chunk starts.
        steps: The denoising steps, noisiest first.
        should_stop: Asked before every step.

    Raises:
        Stopped: If ``should_stop`` said so.
    """
    x = draw_noise(0)
    for draw, (step, following) in enumerate(zip(steps, (*steps[1:], None), strict=True), start=1):
        if should_stop is not None and should_stop():
            raise Stopped
        x0 = to_x0(x, predict_velocity(x, step.modulation), step.level.sigma)
        x = x0 if following is None else renoise(x0, draw_noise(draw), following.level.sigma)
    return x
