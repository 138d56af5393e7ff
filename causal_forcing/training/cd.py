"""Stage 4 of the embedded model: causal consistency distillation from the autoregressive teacher.

    python -m causal_forcing.training.cd

The student learns to jump from any noise level to the clean frame: it must say the same at a level and at the next
lower one, which the teacher's velocity leads to. Teacher and student see the same clean context, so the teacher's ODE
is the student's (Causal Forcing's point). The result samples in 4 steps, and in 2 or 1 after a 4-step first chunk.
``--teacher bidirectional`` distils from the bidirectional teacher instead, for the comparison.

Source: Causal Forcing (arXiv 2602.02214) and Causal Forcing++ (arXiv 2605.15141); consistency models, Song et al. 2023.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from causal_forcing.flow import SHIFT
from causal_forcing.presets import Preset
from causal_forcing.training import latents as data
from causal_forcing.training.ar import CLIPS, batch, blurred_context
from causal_forcing.training.loop import DEFAULT_ROOT, Run, Schedule, StepRandom, background_process
from causal_forcing.training.model import WINDOW_FRAMES, Generator, add_noise, load_stage, new_generator
from causal_forcing.training.teacher_forcing import Layout, Prompts, predict

SCHEDULE = Schedule(steps=1500, learning_rate=5e-4, warmup=30, decay_from=0.5, ema=0.99)
DRAWS = 2
GRID = 16
"""Noise levels of the distillation grid."""


def grid_levels(count: int = GRID) -> Tensor:
    """Return ``count + 1`` shifted noise levels, descending from 1 to 0, float32."""
    u = torch.linspace(1.0, 0.0, count + 1)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def objective(
    teacher: Generator, student: Generator, values: data.Latents, layout: Layout, random: StepRandom
) -> dict[str, Tensor]:
    """Return how far the student is from saying the same at two neighbouring noise levels."""
    clean, texts, of_frame = batch(values, random.numpy, CLIPS)
    levels = grid_levels()
    index = torch.randint(len(levels) - 1, (CLIPS, layout.draws * layout.frames), generator=random.torch)
    sigma, lower = levels[index], levels[index + 1]
    repeated = clean.repeat(1, 1, layout.draws, 1, 1)
    noisy, _ = add_noise(repeated, sigma, random.torch)
    context = blurred_context(clean, random)

    def velocity(generator: Generator, x: Tensor, at: Tensor, prompts: Prompts) -> Tensor:
        return predict(generator.transformer, context, x, 1000 * at, prompts, layout=layout, rotary=generator.rotary)

    with torch.no_grad():
        prompts = Prompts(student.embed(texts).view(CLIPS, 2, student.preset.text_encoder.text_len, -1), of_frame)
        ahead = noisy + _spread(lower - sigma) * velocity(teacher, noisy, sigma, prompts)
        target = ahead - _spread(lower) * velocity(student, ahead, lower, prompts)
    guess = noisy - _spread(sigma) * velocity(student, noisy, sigma, prompts)
    error = (guess - target).square().mean((1, 3, 4))
    return {"loss": error.mean(), "to_clean": (guess.detach() - repeated).square().mean()}


def _spread(level: Tensor) -> Tensor:
    return level[:, None, :, None, None]


def train(
    root: Path,
    *,
    preset: Preset | None = None,
    schedule: Schedule = SCHEDULE,
    seed: int = 5,
    until: int | None = None,
    teacher_stage: str = "ar",
) -> Run:
    """Distil (or go on distilling) into ``root/cd`` (or ``root/cd-bidirectional``) and return the run.

    The text encoder stays the teacher's; its parameters are part of the result all the same.
    """
    values = data.load(root / "latents")
    teacher, student = new_generator(root, seed, preset), new_generator(root, seed, preset)
    for generator in (teacher, student):
        generator.load(load_stage(root, teacher_stage))
        generator.encoder.requires_grad_(False)
    folder = root / ("cd" if teacher_stage == "ar" else f"cd-{teacher_stage}")
    moving = {name: value for name, value in student.parameters.items() if name.startswith("transformer.")}
    run = Run(folder, moving, schedule, seed)
    layout = Layout(values.values.shape[2], DRAWS, window=WINDOW_FRAMES)
    run.train(lambda _step, random: objective(teacher, student, values, layout, random), until=until)
    return run


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    parser.add_argument("--teacher", choices=("ar", "bidirectional"), default="ar", help="which teacher to distil")
    arguments = parser.parse_args()
    background_process(arguments.root)
    raise SystemExit(train(arguments.root, teacher_stage=arguments.teacher).exit_status)


if __name__ == "__main__":
    main()
