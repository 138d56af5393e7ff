"""A stage of the embedded model: causal consistency distillation from the guided autoregressive teacher.

    python -m causal_forcing.training.cd

The student learns to jump from any noise level to the clean frame: it must say the same at a level and at the next
lower one, which the teacher's velocity leads to. Teacher and student see the same clean context, so the teacher's ODE
is the student's (Causal Forcing's point). The result samples in 4 steps, and in 2 or 1 after a 4-step first chunk.
For the comparison ``--teacher bidirectional`` follows the ODE of the bidirectional teacher instead, in which all frames
of a clip have one level and see each other: not the student's (Self-Forcing's initialisation).

Source: Causal Forcing (arXiv 2602.02214) and Causal Forcing++ (arXiv 2605.15141); consistency models, Song et al. 2023.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from causal_forcing.flow import shifted
from causal_forcing.presets import Preset
from causal_forcing.training.ar import Batch, Data, blurred_context, load_data, rehearsal
from causal_forcing.training.loop import (
    CPU,
    Device,
    Run,
    Schedule,
    StepRandom,
    add_arguments,
    chosen_schedule,
    start_process,
    wait_for,
)
from causal_forcing.training.model import Generator, add_noise, load_generator, new_generator
from causal_forcing.training.teacher_forcing import Layout, Prompts

SCHEDULE = Schedule(steps=1500, learning_rate=1e-4, warmup=30, decay_from=0.5, ema=0.99)
GPU_SCHEDULE = Schedule(
    steps=10_000, learning_rate=5e-4, warmup=50, decay_from=0.5, save_every=2000, ema=0.995, budget_s=50
)
DRAWS = 1
GRID = 16
"""Noise levels of the distillation grid."""


def grid_levels(shift: float, count: int = GRID) -> Tensor:
    """Return ``count + 1`` shifted noise levels, descending from 1 to 0, float32."""
    return shifted(torch.linspace(1.0, 0.0, count + 1), shift)


def objective(
    teacher: Generator,
    student: Generator,
    data: Data,
    layout: Layout,
    random: StepRandom,
    *,
    bidirectional: bool = False,
) -> dict[str, Tensor]:
    """Return how far the student is from saying the same at two neighbouring levels, of clips and of first frames.

    Args:
        teacher: Leads from a level to the next.
        student: What is trained.
        data: Clips and first frames.
        layout: Of the student's pass.
        random: Draws levels and noise of this step.
        bidirectional: Whether the teacher's frames see each other both ways.
    """
    batch = data.batch(layout, random)
    clips, to_clean = inconsistency(teacher, student, batch, random, data.device, bidirectional=bidirectional)
    if not data.beginnings:
        return {"loss": clips, "to_clean": to_clean}
    # A first frame by itself sees nothing else, whichever teacher it has.
    beginnings, _ = inconsistency(teacher, student, data.first_frames(random), random, data.device)
    parts = {"clips": clips.detach(), "beginnings": beginnings.detach(), "to_clean": to_clean}
    return {"loss": clips + beginnings} | parts


def inconsistency(
    teacher: Generator,
    student: Generator,
    batch: Batch,
    random: StepRandom,
    device: Device,
    *,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the student's mean squared inconsistency, and its distance to the clean frames (see :func:`objective`)."""
    clean, layout = batch.clean, batch.layout
    levels, generator = grid_levels(student.preset.shift).to(clean.device), random.torch
    shape = (len(clean), layout.draws, 1 if bidirectional else layout.frames)
    index = torch.randint(GRID, shape, generator=generator, device=clean.device)
    index = index.expand(-1, -1, layout.frames).flatten(1)
    sigma, lower = levels[index], levels[index + 1]
    repeated = clean.repeat(1, 1, layout.draws, 1, 1)
    noisy, _ = add_noise(repeated, sigma, generator)
    context = blurred_context(clean, random)
    prompts = fixed_prompts(student, batch, device)
    teachers = replace(batch, layout=replace(layout, bidirectional=True, sink=0)) if bidirectional else batch

    def velocity(model: Generator, x: Tensor, at: Tensor, seen: Batch = batch) -> Tensor:
        with device.autocast():
            return seen.velocity(model, context, x, at, prompts)

    with torch.no_grad():
        ahead = noisy + _spread(lower - sigma) * velocity(teacher, noisy, sigma, teachers)
        target = ahead - _spread(lower) * velocity(student, ahead, lower)
    guess = noisy - _spread(sigma) * velocity(student, noisy, sigma)
    return (guess - target).square().mean(), (guess.detach() - repeated).square().mean()


@torch.no_grad()
def fixed_prompts(generator: Generator, batch: Batch, device: Device) -> Prompts:
    """Return the captions' embeddings in float32, without gradients."""
    with device.autocast():
        prompts = batch.prompts(generator)
    return replace(prompts, embeds=prompts.embeds.float())


def _spread(level: Tensor) -> Tensor:
    return level[:, None, :, None, None]


def train(
    root: Path,
    *,
    preset: Preset | None = None,
    schedule: Schedule = SCHEDULE,
    seed: int = 5,
    until: int | None = None,
    teacher_stage: str = "guided",
    device: Device = CPU,
    wait: bool = False,
) -> Run:
    """Distil (or go on distilling) into ``root/cd`` (``root/cd-ar``, ``root/cd-bidirectional``) and return the run.

    The text encoder stays the teacher's.
    """
    teacher, student = (new_generator(root, seed, preset, device.torch) for _ in range(2))
    for generator in (teacher, student):
        generator.encoder.requires_grad_(False)
    moving, bidirectional = student.transformer_parameters, teacher_stage == "bidirectional"

    def step_loss(data: Data, random: StepRandom) -> dict[str, Tensor]:
        return objective(teacher, student, data, data.layout(DRAWS), random, bidirectional=bidirectional)

    warm_up = rehearsal(step_loss, moving, seed, value="to_clean")
    data = load_data(root, student, device, wait=wait, warm_up=warm_up)
    if wait:
        wait_for(root / teacher_stage)
    for generator in (teacher, student):
        generator.load(load_generator(root, teacher_stage))
    run = Run(root / ("cd" if teacher_stage == "guided" else f"cd-{teacher_stage}"), moving, schedule, seed)
    run.train(lambda _step, random: step_loss(data, random), until=until)
    return run


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, compiles=True)
    parser.add_argument(
        "--teacher", choices=("guided", "ar", "bidirectional"), default="guided", help="which teacher to distil"
    )
    arguments = parser.parse_args()
    device = start_process(arguments)
    run = train(
        arguments.root,
        schedule=chosen_schedule(arguments, SCHEDULE, GPU_SCHEDULE),
        teacher_stage=arguments.teacher,
        device=device,
        wait=arguments.wait,
    )
    raise SystemExit(run.exit_status)


if __name__ == "__main__":
    main()
