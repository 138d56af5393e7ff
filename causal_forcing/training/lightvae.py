"""The embedded ``lightvae``: a quarter of the channels, distilled from the trained ``wan`` VAE to share its latents.

    python -m causal_forcing.training.lightvae

The small decoder learns to draw clips from the large encoder's latents, the small encoder to give those latents. With
``--generated`` every other step draws clips of the generator's instead, as the large decoder draws them, and all steps
weigh colours more, which objects alone have here. Writes ``<root>/lightvae``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from causal_forcing.config import VaeConfig
from causal_forcing.training import generated, whole_clip
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
from causal_forcing.training.model import load_stage
from causal_forcing.training.vae import CONFIG, LIGHT_CONFIG, as_video, batch, pixel_error

SCHEDULE = Schedule(steps=3000, learning_rate=5e-3, decay_from=0.4, ema=0.995)
GPU_SCHEDULE = Schedule(steps=6000, learning_rate=5e-3, decay_from=0.4, save_every=1000, ema=0.995, budget_s=80)
CHROMA_WEIGHT = 4.0
"""Weight of the error in what makes a pixel differ from grey. Backgrounds are grey, so that these are the objects."""
GENERATED_CLIPS = 2
"""Clips of a step that draws generated ones."""
LATENT_NOISE = 0.1
"""Most noise added to the latents that the small decoder reads, in their standard deviations: a generator errs, too."""


def drawing_error(drawn: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Return the reconstruction ``loss`` and its parts, with the weight of :data:`CHROMA_WEIGHT` on chroma."""
    error = pixel_error(drawn, video)
    off = drawn - video
    chroma = off - off.mean(1, keepdim=True)
    squared = chroma.square().mean()
    return error | {"loss": error["loss"] + CHROMA_WEIGHT * (chroma.abs().mean() + 2 * squared), "chroma": squared}


def objective(
    large: whole_clip.Parameters,
    small: whole_clip.Parameters,
    configs: tuple[VaeConfig, VaeConfig],
    video: Tensor,
    random: StepRandom,
    *,
    device: Device = CPU,
    error: Callable[[Tensor, Tensor], dict[str, Tensor]] = pixel_error,
) -> dict[str, Tensor]:
    """Return the loss of one batch and its parts.

    Args:
        large: The trained parameters.
        small: The ones being trained.
        configs: Sizes of both.
        video: ``[B, 3, T, H, W]`` in [-1, 1].
        random: Draws the noise of this step.
        device: What computes.
        error: Of what is drawn: :func:`pixel_error` or :func:`drawing_error`.
    """
    with device.autocast():
        with torch.no_grad():
            latents = whole_clip.encode(large, configs[0], video)[0].float()
        noise = torch.randn(latents.shape, generator=random.torch, device=latents.device)
        level = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, 1, generator=random.torch, device=latents.device)
        heard = latents + level * latents.std() * noise
        drawn = error(whole_clip.decode(small, configs[1], heard).float(), video)
        guessed = whole_clip.encode(small, configs[1], video)[0].float()
    latent = (guessed - latents).square().mean() / latents.square().mean()
    return drawn | {"loss": drawn["loss"] + 0.1 * latent, "latent": latent}


def generated_objective(
    small: whole_clip.Parameters, config: VaeConfig, latents: Tensor, video: Tensor, *, device: Device = CPU
) -> dict[str, Tensor]:
    """Return the loss of one batch of generated clips and its parts.

    Args:
        small: The parameters being trained.
        config: Their sizes.
        latents: ``[B, 16, F, h, w]``, not normalised.
        video: ``[B, 3, T, H, W]`` in [-1, 1]: what the large decoder draws of them.
        device: What computes.
    """
    with device.autocast():
        drawn = whole_clip.decode(small, config, latents)
    return drawing_error(drawn.float(), video)


def train(
    root: Path,
    *,
    config: VaeConfig = LIGHT_CONFIG,
    large_config: VaeConfig = CONFIG,
    schedule: Schedule = SCHEDULE,
    seed: int = 6,
    until: int | None = None,
    device: Device = CPU,
    begin: str | None = None,
    with_generated: bool = False,
) -> Run:
    """Distil (or go on distilling) in ``root/lightvae`` and return the run.

    Args:
        root: Training folder.
        config: Sizes of the small VAE.
        large_config: Sizes of the large one.
        schedule: Length and learning rate.
        seed: Source of all randomness.
        until: Step to stop at.
        device: What computes.
        begin: Stage whose averaged weights to begin with, instead of seeded ones; it may have fewer residual blocks.
        with_generated: Whether every other step draws clips of :mod:`~causal_forcing.training.generated`.
    """
    large = load_file(root / "vae" / "ema.safetensors", device=str(device.torch))
    values = (
        whole_clip.initial_parameters(config, seed)
        if begin is None
        else whole_clip.deepened(load_stage(root, begin), config, seed)
    )
    parameters = {name: value.to(device.torch) for name, value in values.items()}
    latents, frames = generated.load(root) if with_generated else (torch.empty(0), torch.empty(0))
    error = drawing_error if with_generated else pixel_error
    run = Run(root / "lightvae", parameters, schedule, seed)

    def step_objective(step: int, random: StepRandom) -> dict[str, Tensor]:
        if with_generated and step % 2 == 1:
            chosen = torch.from_numpy(random.numpy.integers(len(latents), size=GENERATED_CLIPS))
            video = as_video(frames[chosen].to(device.torch))
            return generated_objective(run.parameters, config, latents[chosen].to(device.torch), video, device=device)
        video = batch(step, run.progress, random.numpy, device)
        configs = large_config, config
        return objective(large, run.parameters, configs, video, random, device=device, error=error)

    run.train(step_objective, until=until)
    return run


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--begin", metavar="STAGE", help="begin with the averaged weights of a stage")
    parser.add_argument("--generated", action="store_true", help="learn from clips of the generator's, too")
    arguments = parser.parse_args()
    device = start_process(arguments)
    if arguments.wait:
        wait_for(arguments.root / "vae")
    schedule = chosen_schedule(arguments, SCHEDULE, GPU_SCHEDULE)
    run = train(
        arguments.root,
        schedule=schedule,
        device=device,
        begin=arguments.begin,
        with_generated=arguments.generated,
    )
    raise SystemExit(run.exit_status)


if __name__ == "__main__":
    main()
