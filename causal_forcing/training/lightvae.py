"""The embedded ``lightvae``: a quarter of the channels, distilled from the trained ``wan`` VAE to share its latents.

    python -m causal_forcing.training.lightvae

The small decoder learns to draw clips from the large encoder's latents, the small encoder to give those latents. Writes
``<root>/lightvae``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from causal_forcing.config import VaeConfig
from causal_forcing.training import whole_clip
from causal_forcing.training.loop import DEFAULT_ROOT, Run, Schedule, StepRandom, background_process
from causal_forcing.training.vae import CONFIG, LIGHT_CONFIG, batch, pixel_error

SCHEDULE = Schedule(steps=3000, learning_rate=5e-3, decay_from=0.4, ema=0.995)


def objective(
    large: whole_clip.Parameters, small: whole_clip.Parameters, configs: tuple[VaeConfig, VaeConfig], video: Tensor
) -> dict[str, Tensor]:
    """Return the loss of one batch and its parts.

    Args:
        large: The trained parameters.
        small: The ones being trained.
        configs: Sizes of both.
        video: ``[B, 3, T, H, W]`` in [-1, 1].
    """
    with torch.no_grad():
        latents = whole_clip.encode(large, configs[0], video)[0]
    drawn = pixel_error(whole_clip.decode(small, configs[1], latents), video)
    guessed = whole_clip.encode(small, configs[1], video)[0]
    latent = (guessed - latents).square().mean() / latents.square().mean()
    return drawn | {"loss": drawn["loss"] + 0.1 * latent, "latent": latent}


def train(
    root: Path,
    *,
    config: VaeConfig = LIGHT_CONFIG,
    large_config: VaeConfig = CONFIG,
    schedule: Schedule = SCHEDULE,
    seed: int = 6,
    until: int | None = None,
) -> Run:
    """Distil (or go on distilling) in ``root/lightvae`` and return the run."""
    large = load_file(root / "vae" / "ema.safetensors")
    run = Run(root / "lightvae", whole_clip.initial_parameters(config, seed), schedule, seed)

    def step_objective(step: int, random: StepRandom) -> dict[str, Tensor]:
        return objective(large, run.parameters, (large_config, config), batch(step, random.numpy, schedule))

    run.train(step_objective, until=until)
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
