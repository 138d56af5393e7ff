"""Stage 1 of the embedded model: the Wan VAE at small width, trained on the world.

    python -m causal_forcing.training.vae

Reconstruction (L1 and squared error) and a light KL on random clips: mostly 32x32 crops, which give more variety for
the same arithmetic, then whole frames. Writes ``<root>/vae/ema.safetensors``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from causal_forcing.config import VaeConfig
from causal_forcing.training import whole_clip, world
from causal_forcing.training.loop import DEFAULT_ROOT, Run, Schedule, StepRandom, background_process

CONFIG = VaeConfig(base_dim=16, num_res_blocks=1)
"""Sizes of the embedded ``wan`` VAE; its latent mean and std are measured by the latents stage."""

LIGHT_CONFIG = VaeConfig(base_dim=4, num_res_blocks=1)
"""Sizes of the embedded ``lightvae``: a quarter of the channels."""

SCHEDULE = Schedule(steps=1600, learning_rate=3e-3, decay_from=0.4, save_every=25, ema=0.995)
KL_WEIGHT = 5e-4
MOST_OBJECTS = 7
OBJECT_CHROMA = 0.2
OBJECT_WEIGHT = 1.0
"""Extra weight of coloured pixels."""

CROP = 32
CROPPED_CLIPS = 8
WHOLE_CLIPS = 2
"""At least 2: with one clip and one thread PyTorch leaves oneDNN and takes ten times as long (measured)."""
SHORT_FRAMES, LONG_FRAMES = 9, 17
WHOLE_FROM = 0.75
"""Fraction of the run after which every clip is whole (before, one step in four)."""


def crowded_scene(rng: np.random.Generator) -> world.Scene:
    """Return a scene of two to seven objects: with one, most of a crop is background and colour is learnt late."""
    things = tuple(world.draw_thing(rng) for _ in range(int(rng.integers(2, MOST_OBJECTS + 1))))
    return world.Scene(str(rng.choice(world.BACKGROUNDS)), things)


def random_clip(rng: np.random.Generator, frames: int) -> NDArray[np.uint8]:
    """Return ``[frames, 64, 64, 3]`` uint8 of a random clip, one in four with a sudden change of everything."""
    scene = crowded_scene(rng)
    segments = world.draw_clip(rng, scene, frames)
    if rng.random() < 1 / 4:
        at = 1 + 4 * int(rng.integers(0, (frames - 1) // 4))
        segments = world.draw_clip(rng, scene, at) + world.draw_clip(rng, crowded_scene(rng), frames - at)
    return world.render(segments)


def to_video(clips: list[NDArray[np.uint8]]) -> Tensor:
    """Return uint8 clips as ``[B, 3, T, H, W]`` float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return stacked.to(torch.float32) / 127.5 - 1


def batch(step: int, rng: np.random.Generator, schedule: Schedule) -> Tensor:
    """Return the clips of one step."""
    if step >= WHOLE_FROM * schedule.steps or step % 4 == 3:
        frames = LONG_FRAMES if step % 8 == 7 else SHORT_FRAMES
        return to_video([random_clip(rng, frames) for _ in range(WHOLE_CLIPS)])
    clips = []
    for _ in range(CROPPED_CLIPS):
        row, column = rng.integers(0, world.SIDE - CROP + 1, size=2)
        clips.append(random_clip(rng, SHORT_FRAMES)[:, row : row + CROP, column : column + CROP])
    return to_video(clips)


def pixel_error(drawn: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Return the reconstruction ``loss`` and its parts; coloured pixels, which objects are made of, weigh more."""
    error = drawn - video
    coloured = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True) > OBJECT_CHROMA).to(error.dtype)
    weight = 1 + OBJECT_WEIGHT * coloured
    weight = weight / weight.mean()
    absolute, squared = (weight * error.abs()).mean(), (weight * error.square()).mean()
    return {"loss": absolute + 2 * squared, "l1": error.abs().mean(), "mse": error.square().mean()}


def objective(
    parameters: Mapping[str, Tensor], config: VaeConfig, video: Tensor, random: StepRandom
) -> dict[str, Tensor]:
    """Return the loss of one batch and its parts."""
    mean, log_variance = whole_clip.encode(parameters, config, video)
    noise = torch.randn(mean.shape, generator=random.torch)
    error = pixel_error(whole_clip.decode(parameters, config, mean + (0.5 * log_variance).exp() * noise), video)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error | {"loss": error["loss"] + KL_WEIGHT * kl, "kl": kl}


def train(
    root: Path, *, config: VaeConfig = CONFIG, schedule: Schedule = SCHEDULE, seed: int = 1, until: int | None = None
) -> Run:
    """Train (or go on training) in ``root/vae`` and return the run."""
    run = Run(root / "vae", whole_clip.initial_parameters(config, seed), schedule, seed)
    run.train(
        lambda step, random: objective(run.parameters, config, batch(step, random.numpy, schedule), random), until=until
    )
    return run


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    root = parser.parse_args().root
    background_process(root)
    raise SystemExit(train(root).exit_status)


if __name__ == "__main__":
    main()
