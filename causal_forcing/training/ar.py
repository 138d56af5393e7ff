"""Stage 3 of the embedded model: autoregressive diffusion with teacher forcing.

    python -m causal_forcing.training.ar

Every frame is denoised from the clean frames before it (Causal Forcing's first stage), with several noise draws per
clean clip. The text encoder is trained along. With ``--bidirectional`` the same budget trains a teacher whose frames
see each other both ways, for the comparison with Self-Forcing's initialisation. Writes ``<root>/ar`` (or
``<root>/bidirectional``).

Source: Causal Forcing (arXiv 2602.02214).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from causal_forcing.presets import Preset
from causal_forcing.training import latents as data
from causal_forcing.training.loop import DEFAULT_ROOT, Run, Schedule, StepRandom, background_process
from causal_forcing.training.model import WINDOW_FRAMES, Generator, add_noise, draw_levels, new_generator
from causal_forcing.training.teacher_forcing import Layout, Prompts, predict

SCHEDULE = Schedule(steps=6000, learning_rate=2e-3, warmup=50, decay_from=0.6, ema=0.998)
CLIPS = 4
DRAWS = 3
CONTEXT_NOISE = 0.1
"""Most noise mixed into the clean context, so that the model forgives its own small errors."""


def batch(values: data.Latents, rng: np.random.Generator, clips: int) -> tuple[Tensor, list[str], Tensor]:
    """Return random clips: latents ``[B, 16, F, h, w]``, two captions a clip, and each frame's caption ``[B, F]``."""
    chosen = [int(index) for index in rng.integers(len(values.clips), size=clips)]
    texts, of_frame = data.prompts_of([values.clips[i] for i in chosen], values.values.shape[2], rng)
    return values.values[chosen], texts, of_frame


def blurred_context(clean: Tensor, random: StepRandom) -> Tensor:
    """Return the clean context with a little noise, its amount drawn per clip."""
    level = CONTEXT_NOISE * torch.rand(clean.shape[0], 1, 1, 1, 1, generator=random.torch)
    return (1 - level) * clean + level * torch.randn(clean.shape, generator=random.torch)


def objective(generator: Generator, values: data.Latents, layout: Layout, random: StepRandom) -> dict[str, Tensor]:
    """Return the velocity error of one random batch."""
    clean, texts, of_frame = batch(values, random.numpy, CLIPS)
    levels = draw_levels((CLIPS, layout.draws * layout.frames // layout.chunk), random.torch)
    if layout.bidirectional:
        levels = levels.view(CLIPS, layout.draws, -1)[:, :, :1].expand(-1, -1, layout.frames).flatten(1)
    sigmas = levels.repeat_interleave(1 if layout.bidirectional else layout.chunk, 1)
    noisy, velocity = add_noise(clean.repeat(1, 1, layout.draws, 1, 1), sigmas, random.torch)
    embeds = generator.embed(texts).view(CLIPS, 2, generator.preset.text_encoder.text_len, -1)
    guess = predict(
        generator.transformer,
        blurred_context(clean, random),
        noisy,
        1000 * sigmas,
        Prompts(embeds, of_frame),
        layout=layout,
        rotary=generator.rotary,
    )
    return {"loss": (guess - velocity).square().mean()}


def train(
    root: Path,
    *,
    preset: Preset | None = None,
    schedule: Schedule = SCHEDULE,
    seed: int = 4,
    until: int | None = None,
    bidirectional: bool = False,
) -> Run:
    """Train (or go on training) in ``root/ar`` or ``root/bidirectional`` and return the run."""
    values = data.load(root / "latents")
    generator = new_generator(root, seed, preset)
    folder = root / ("bidirectional" if bidirectional else "ar")
    run = Run(folder, generator.parameters, schedule, seed)
    layout = Layout(values.values.shape[2], DRAWS, window=WINDOW_FRAMES, bidirectional=bidirectional)
    run.train(lambda _step, random: objective(generator, values, layout, random), until=until)
    return run


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    parser.add_argument("--bidirectional", action="store_true", help="train the bidirectional teacher instead")
    arguments = parser.parse_args()
    background_process(arguments.root)
    raise SystemExit(train(arguments.root, bidirectional=arguments.bidirectional).exit_status)


if __name__ == "__main__":
    main()
