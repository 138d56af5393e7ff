"""A stage of the embedded model: the Wan VAE at small width, trained on the world.

    python -m causal_forcing.training.vae

Reconstruction (L1 and squared error) and a light KL on random clips. On a CPU these are mostly 32x32 crops, which give
more variety for the same arithmetic, then whole frames; on a GPU always whole frames. Writes
``<root>/vae/ema.safetensors``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from causal_forcing.config import VaeConfig
from causal_forcing.training import drawing, whole_clip, world
from causal_forcing.training.loop import (
    CPU,
    Device,
    Run,
    Schedule,
    StepRandom,
    add_arguments,
    chosen_schedule,
    start_process,
)

CONFIG = VaeConfig(base_dim=16, num_res_blocks=1)
"""Sizes of the embedded ``wan`` VAE; its latent mean and std are measured by the latents stage."""

LIGHT_CONFIG = VaeConfig(base_dim=4, num_res_blocks=2)
"""Sizes of the embedded ``lightvae``: a quarter of the channels, which need more blocks to draw small shapes."""

SCHEDULE = Schedule(steps=1600, learning_rate=3e-3, decay_from=0.4, save_every=25, ema=0.995)
GPU_SCHEDULE = Schedule(steps=4000, learning_rate=3e-3, decay_from=0.4, save_every=1000, ema=0.995, budget_s=75)
KL_WEIGHT = 1e-3
OBJECT_CHROMA = 0.2
OBJECT_WEIGHT = 1.0
"""Extra weight of coloured pixels."""

CROWDED, SPARSE = (2, 7), (1, 3)
"""Fewest and most objects of a clip, in the first half of a run and after it: with few, most of a clip is background,
and colour is learnt late."""

CROP = 32
CROPPED_CLIPS = 8
WHOLE_CLIPS = 2
"""At least 2: with one clip and one thread PyTorch leaves oneDNN and takes ten times as long (measured)."""
GPU_CLIPS = 24
SHORT_FRAMES, LONG_FRAMES, LONGEST_FRAMES = 9, 17, 25
WHOLE_FROM = 0.75
"""Fraction of a run on a CPU after which every clip is whole (before, one step in four)."""
CHANGE_SHARE = 0.25
"""Share of clips with a sudden change of everything."""


@dataclass(frozen=True)
class Plan:
    """What a step draws: clips, their pixel frames, and the side of a crop or of the whole frame."""

    clips: int
    frames: int
    side: int

    @classmethod
    def of(cls, step: int, progress: float, device: Device) -> Plan:
        """Return the plan of a step."""
        long = step % 8 == 7
        if device.kind != "cpu":
            frames = (LONGEST_FRAMES if step % 16 == 7 else LONG_FRAMES) if long else SHORT_FRAMES
            return cls(max(2, GPU_CLIPS * SHORT_FRAMES // frames), frames, world.SIDE)
        if progress >= WHOLE_FROM or step % 4 == 3:
            return cls(WHOLE_CLIPS, LONG_FRAMES if long else SHORT_FRAMES, world.SIDE)
        return cls(CROPPED_CLIPS, SHORT_FRAMES, CROP)


def random_clips(rng: np.random.Generator, clips: int, frames: int, objects: tuple[int, int]) -> drawing.Pictures:
    """Return random clips, one in four with a sudden change of everything at the start of a latent frame."""
    first, second = (drawing.random_pictures(rng, clips, frames, objects) for _ in range(2))
    at = 1 + 4 * rng.integers(0, max(1, (frames - 1) // 4), size=clips)
    return first.then(second, np.where(rng.random(clips) < CHANGE_SHARE, at, frames))


def batch(step: int, progress: float, rng: np.random.Generator, device: Device = CPU) -> Tensor:
    """Return the clips of one step, ``[B, 3, T, H, W]`` float32 in [-1, 1]."""
    plan = Plan.of(step, progress, device)
    pictures = random_clips(rng, plan.clips, plan.frames, CROWDED if progress < 0.5 else SPARSE)
    row, column = rng.integers(0, world.SIDE - plan.side + 1, size=2)
    pixels = drawing.draw(pictures, device.torch)
    return as_video(pixels[:, :, row : row + plan.side, column : column + plan.side])


def as_video(pixels: Tensor) -> Tensor:
    """Return ``[B, T, H, W, 3]`` uint8 as ``[B, 3, T, H, W]`` float32 in [-1, 1]."""
    return pixels.permute(0, 4, 1, 2, 3).to(torch.float32) / 127.5 - 1


def pixel_error(drawn: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Return the reconstruction ``loss`` and its parts; coloured pixels, which objects are made of, weigh more."""
    error = drawn - video
    coloured = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True) > OBJECT_CHROMA).to(error.dtype)
    weight = 1 + OBJECT_WEIGHT * coloured
    weight = weight / weight.mean()
    absolute, squared = (weight * error.abs()).mean(), (weight * error.square()).mean()
    return {"loss": absolute + 2 * squared, "l1": error.abs().mean(), "mse": error.square().mean()}


def objective(
    parameters: Mapping[str, Tensor], config: VaeConfig, video: Tensor, random: StepRandom, device: Device = CPU
) -> dict[str, Tensor]:
    """Return the loss of one batch and its parts."""
    with device.autocast():
        mean, log_variance = (part.float() for part in whole_clip.encode(parameters, config, video))
        noise = torch.randn(mean.shape, generator=random.torch, device=mean.device)
        drawn = whole_clip.decode(parameters, config, mean + (0.5 * log_variance).exp() * noise)
    error = pixel_error(drawn.float(), video)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error | {"loss": error["loss"] + KL_WEIGHT * kl, "kl": kl}


def train(
    root: Path,
    *,
    config: VaeConfig = CONFIG,
    schedule: Schedule = SCHEDULE,
    seed: int = 1,
    until: int | None = None,
    device: Device = CPU,
) -> Run:
    """Train (or go on training) in ``root/vae`` and return the run."""
    parameters = {name: value.to(device.torch) for name, value in whole_clip.initial_parameters(config, seed).items()}
    run = Run(root / "vae", parameters, schedule, seed)

    def step_objective(step: int, random: StepRandom) -> dict[str, Tensor]:
        video = batch(step, run.progress, random.numpy, device)
        return objective(run.parameters, config, video, random, device)

    run.train(step_objective, until=until)
    return run


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    device = start_process(arguments)
    schedule = chosen_schedule(arguments, SCHEDULE, GPU_SCHEDULE)
    raise SystemExit(train(arguments.root, schedule=schedule, device=device).exit_status)


if __name__ == "__main__":
    main()
