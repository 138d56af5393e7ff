"""A stage of the embedded model: autoregressive diffusion with teacher forcing.

    python -m causal_forcing.training.ar

Every frame is denoised from the clean frames before it (Causal Forcing's first stage), with several noise draws per
clean clip. What an object looks like is decided in a clip's first frame alone, so a batch of first frames by themselves
is added to every step; some of them without a caption, which the distillation's guidance needs. The text encoder is
trained along.
With ``--first-frames`` a finished teacher goes on with first frames alone, its text encoder kept. With
``--bidirectional`` the same budget trains a teacher whose frames see each other both ways, for the comparison with
Self-Forcing's initialisation. Writes ``<root>/ar`` (or ``<root>/first-frames`` or ``<root>/bidirectional``).

Source: Causal Forcing (arXiv 2602.02214).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from causal_forcing.presets import Preset
from causal_forcing.tokenizer import END_ID, PAD_ID
from causal_forcing.training import latents, world
from causal_forcing.training.loop import (
    CPU,
    Device,
    Run,
    Schedule,
    StepRandom,
    add_arguments,
    chosen_schedule,
    start_process,
    step_rng,
    time_limit,
    wait_for,
)
from causal_forcing.training.model import (
    SINK_FRAMES,
    WINDOW_FRAMES,
    Generator,
    add_noise,
    draw_levels,
    load_generator,
    new_generator,
)
from causal_forcing.training.teacher_forcing import BlockPass, Layout, Prompts, compiled, predict

Rehearsal = Callable[["Data"], tuple[float, Tensor]]
"""Runs a step on some data, but for the update; returns one of its values and the gradient of the blocks, ``[P]``."""

Stage = Literal["ar", "bidirectional", "first-frames"]
"""Teachers of this module, by the folders that they are in."""

SCHEDULE = Schedule(steps=6000, learning_rate=2e-3, warmup=50, decay_from=0.6, ema=0.998)
GPU_SCHEDULE = Schedule(
    steps=20_000, learning_rate=2e-3, warmup=100, decay_from=0.5, save_every=2000, ema=0.998, budget_s=110
)
CLIPS, GPU_CLIPS = 3, 48
WORDINGS, GPU_WORDINGS = 4, 8
"""Captions of each scene."""
DRAWS = 3
BEGINNINGS, GPU_BEGINNINGS = 32, 384
"""First frames of a step, beside its clips; each is drawn :data:`BEGINNING_DRAWS` times."""
BEGINNING_DRAWS = 4
MORE_BEGINNINGS = 2
"""How many times as many first frames a step has that has nothing else."""
UNPROMPTED = 0.15
"""Share of first frames whose caption is taken away."""
COMPILE_LIMIT_S, GPU_COMPILE_LIMIT_S = 300, 60
"""Longest wait for the compiler."""
LOSS_TOLERANCE, LEAST_COSINE = 0.02, 0.99
"""How near a compiled pass has to come to the other one: its loss relatively, its gradient by their angle."""
NUDGE = 0.02
"""Standard deviation of what is added to the weights to compare gradients: behind a head of zeros there are none."""
ODDS = {"circling": 3.0, "bouncing": 2.0, "cross": 1.5, "ring": 1.5, "small": 1.5}
"""How many times as often as others clips with such objects are drawn; the factors of one object multiply.

What bounces or circles moves differently in every frame; small crosses and rings are lost the most often.
"""
OPENING_ODDS = 3.0
"""How many times as often as others clips that begin where streams do are drawn."""
RECACHED = 0.25
"""Share of clips whose context is read under the last caption throughout, as after a switch with ``recache``."""
CONTEXT_NOISE = 0.2
"""Most noise mixed into the clean context, so that the model forgives its own small errors."""


@dataclass(frozen=True)
class Batch:
    """What one pass computes on.

    Attributes:
        clean: ``[B, 16, F, h, w]`` normalised latents.
        ids: ``[B * P, L]`` int64, tokens of each clip's captions.
        of_frame: ``[B, F]`` int64: which of them each frame has.
        of_clean: ``[B, F]`` int64: which of them each frame is read under as context.
        layout: Of the pass.
        block_pass: See :func:`~causal_forcing.training.teacher_forcing.predict`.
    """

    clean: Tensor
    ids: Tensor
    of_frame: Tensor
    of_clean: Tensor
    layout: Layout
    block_pass: BlockPass | None = None

    def prompts(self, generator: Generator) -> Prompts:
        """Return the captions' embeddings, ``[B, P, text_len, text_dim]``, with gradients."""
        embeds = generator.embed(self.ids)
        return Prompts(embeds.view(len(self.clean), -1, *embeds.shape[1:]), self.of_frame, self.of_clean)

    def velocity(
        self, generator: Generator, context: Tensor, noisy: Tensor, sigmas: Tensor, prompts: Prompts
    ) -> Tensor:
        """Return the velocity of noisy frames ``[B, 16, draws * F, h, w]`` at their levels ``[B, draws * F]``.

        Args:
            generator: What predicts it.
            context: ``[B, 16, F, h, w]``: the clean frames, as they are read.
            noisy: Draw by draw.
            sigmas: Of each noisy frame.
            prompts: Of each clip.
        """
        return predict(
            generator.transformer,
            context,
            noisy,
            1000 * sigmas,
            prompts,
            layout=self.layout,
            rotary=generator.rotary,
            block_pass=self.block_pass,
        )

    def leading(self, count: int, *, draws: int) -> Batch:
        """Return so many of its clips, with so many noisy copies of each."""
        captions = count * len(self.ids) // len(self.clean)
        return replace(
            self,
            clean=self.clean[:count],
            ids=self.ids[:captions],
            of_frame=self.of_frame[:count],
            of_clean=self.of_clean[:count],
            layout=replace(self.layout, draws=draws),
        )

    def unprompted(self, which: Tensor | None = None) -> Batch:
        """Return the same frames with empty captions: all of them, or those that a mask ``[B * P]`` names."""
        empty = torch.full_like(self.ids, PAD_ID)
        empty[:, 0] = END_ID
        return replace(self, ids=empty if which is None else torch.where(which[:, None], empty, self.ids))


@dataclass(frozen=True)
class Data:
    """The data set on a device, and how a stage reads it.

    Attributes:
        values: ``[N, 16, F, h, w]`` normalised latents.
        wordings: Captions of each clip.
        first_values: ``[M, 16, 1, h, w]`` normalised latents of first frames by themselves.
        first_wordings: Their captions.
        clips: Clips of a step.
        beginnings: First frames of a step.
        device: What computes.
        block_pass: See :func:`~causal_forcing.training.teacher_forcing.predict`.
        odds: ``[N]`` float64: how often each clip is drawn, 1 in sum; None for all alike.
    """

    values: Tensor
    wordings: latents.Wordings
    first_values: Tensor
    first_wordings: latents.Wordings
    clips: int
    beginnings: int
    device: Device = CPU
    block_pass: BlockPass | None = None
    odds: NDArray[np.float64] | None = None

    def batch(self, layout: Layout, random: StepRandom) -> Batch:
        """Return random clips with both of their captions; some are re-read under the second, as ``recache`` does."""
        drawn = torch.from_numpy(random.numpy.choice(len(self.values), size=self.clips, p=self.odds))
        chosen = drawn.to(self.values.device)
        ids, of_frame = self.wordings.choose(chosen, self.values.shape[2], random.numpy)
        recached = torch.from_numpy(random.numpy.random((self.clips, 1)) < RECACHED).to(of_frame.device)
        of_clean = torch.where(recached, of_frame[:, -1:], of_frame)
        return Batch(self.values[chosen], ids, of_frame, of_clean, layout, self.block_pass)

    def first_frames(self, random: StepRandom) -> Batch:
        """Return random first frames with their captions."""
        drawn = torch.from_numpy(random.numpy.integers(len(self.first_values), size=self.beginnings))
        chosen = drawn.to(self.first_values.device)
        ids, of_frame = self.first_wordings.choose(chosen, 1, random.numpy)
        return Batch(self.first_values[chosen], ids[::2], of_frame, of_frame, Layout(1, BEGINNING_DRAWS))

    def layout(self, draws: int, *, window: int = WINDOW_FRAMES, bidirectional: bool = False) -> Layout:
        """Return the layout of a pass over a batch."""
        sink = 0 if bidirectional else SINK_FRAMES
        return Layout(self.values.shape[2], draws, window=window, sink=sink, bidirectional=bidirectional)


def load_data(
    root: Path,
    generator: Generator,
    device: Device,
    *,
    wait: bool = False,
    warm_up: Rehearsal | None = None,
) -> Data:
    """Return the data of a training folder.

    Args:
        root: Training folder.
        generator: Whose tokenizer to use.
        device: Where to put it.
        wait: Word the captions as soon as the clips are known, then wait for the latents.
        warm_up: Runs a step, to check compilation; called while waiting with data of noise, otherwise with the data.
    """
    whole, first = root / "latents", root / "beginnings"
    cpu, text_len = device.kind == "cpu", generator.preset.text_encoder.text_len

    def word(folder: Path, wordings: int) -> latents.Wordings:
        clips = latents.published(folder) if wait else latents.load(folder).clips
        return latents.word(clips, generator.tokenizer, text_len, wordings=wordings, device=device.torch)

    data = Data(
        torch.empty(0),
        word(whole, WORDINGS if cpu else GPU_WORDINGS),
        torch.empty(0),
        word(first, 1),
        *((CLIPS, BEGINNINGS) if cpu else (GPU_CLIPS, GPU_BEGINNINGS)),
        device,
        compiled() if device.compiled else None,
    )
    if wait:
        noise = torch.randn(len(data.wordings.ids), 16, latents.CLIP_FRAMES, 8, 8, device=device.torch)
        first_noise = torch.randn(len(data.first_wordings.ids), 16, 1, 8, 8, device=device.torch)
        block_pass = _working(replace(data, values=noise, first_values=first_noise), warm_up)
        data = replace(data, block_pass=block_pass)
        del noise, first_noise
        wait_for(whole)
    clips = latents.load(whole, device.torch)
    first_values = latents.load(first, device.torch, like=clips).values
    data = replace(data, values=clips.values, first_values=first_values, odds=odds(clips.clips))
    return data if wait else replace(data, block_pass=_working(data, warm_up))


def odds(clips: Sequence[latents.Clip]) -> NDArray[np.float64]:
    """Return how often each clip is drawn, ``[N]``, 1 in sum: by the object in it that ``ODDS`` favours the most."""
    favours = [max(_favour(thing) for scene in clip.scenes for thing in scene.things) for clip in clips]
    values = np.array(favours) * np.where(latents.openings(len(clips)), OPENING_ODDS, 1.0)
    return np.asarray(values / values.sum())


def _favour(thing: world.Thing) -> float:
    return math.prod(ODDS.get(word, 1.0) for word in (thing.shape, thing.size, thing.motion))


def _working(data: Data, rehearse: Rehearsal | None) -> BlockPass | None:
    """Return the compiled pass through a block, or None where it does not compile in time to the same numbers."""
    if data.block_pass is None or rehearse is None:
        return data.block_pass
    wanted, right = rehearse(replace(data, block_pass=None))
    try:
        with time_limit(COMPILE_LIMIT_S if data.device.kind == "cpu" else GPU_COMPILE_LIMIT_S):
            found, gradient = rehearse(data)
    except (TorchDynamoException, TimeoutError) as error:
        print(f"goes on without compilation: {error!r:.300}", file=sys.stderr)
        return None
    cosine = torch.cosine_similarity(gradient.double(), right.double(), dim=0).item()
    works = abs(found - wanted) < LOSS_TOLERANCE * wanted and cosine > LEAST_COSINE
    numbers = f"loss {found:.4f}, without compilation {wanted:.4f}, cosine of the gradients {cosine:.5f}"
    print(f"{'compiled' if works else 'goes on without compilation'}: {numbers}", file=sys.stderr)
    return data.block_pass if works else None


def rehearsal(
    step_loss: Callable[[Data, StepRandom], dict[str, Tensor]],
    parameters: Mapping[str, Tensor],
    seed: int,
    *,
    value: str = "loss",
) -> Rehearsal:
    """Return what runs a step on some data, but for the update, with weights a little off (for ``load_data``)."""

    @torch.no_grad()
    def nudge(generator: torch.Generator) -> None:
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, device=parameter.device), alpha=NUDGE)

    def run(data: Data) -> tuple[float, Tensor]:
        random = step_rng(seed, 0, data.device.torch)
        before = [parameter.detach().clone() for parameter in parameters.values()]
        nudge(random.torch)
        values = step_loss(data, random)
        values["loss"].backward()  # type: ignore[no-untyped-call]
        inside = [value for name, value in parameters.items() if ".blocks." in name]
        gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in inside])
        with torch.no_grad():
            for parameter, value_before in zip(parameters.values(), before, strict=True):
                parameter.copy_(value_before)
                parameter.grad = None
        return values[value].item(), gradient

    return run


def blurred_context(clean: Tensor, random: StepRandom) -> Tensor:
    """Return the clean context with a little noise, its amount drawn per clip."""
    generator, device = random.torch, clean.device
    level = CONTEXT_NOISE * torch.rand(clean.shape[0], 1, 1, 1, 1, generator=generator, device=device)
    return (1 - level) * clean + level * torch.randn(clean.shape, generator=generator, device=device)


def objective(generator: Generator, data: Data, layout: Layout, random: StepRandom) -> dict[str, Tensor]:
    """Return the velocity error of one random batch of clips, and of first frames."""
    clips = velocity_error(generator, data.batch(layout, random), random, data.device)
    if not data.beginnings:
        return {"loss": clips}
    beginnings = first_frames_error(generator, data, random)
    return {"loss": clips + beginnings, "clips": clips.detach(), "beginnings": beginnings.detach()}


def first_frames_error(generator: Generator, data: Data, random: StepRandom) -> Tensor:
    """Return the velocity error of first frames by themselves, some of them under an empty caption, 0-dim."""
    batch = data.first_frames(random)
    unprompted = torch.from_numpy(random.numpy.random(len(batch.ids)) < UNPROMPTED).to(batch.ids.device)
    return velocity_error(generator, batch.unprompted(unprompted), random, data.device)


def velocity_error(
    generator: Generator,
    batch: Batch,
    random: StepRandom,
    device: Device,
    *,
    history: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error of the velocity, 0-dim.

    Args:
        generator: What predicts it.
        batch: The frames to predict.
        random: Draws levels and noise.
        device: What computes.
        history: ``[B, 16, F, h, w]``: what is read as the past instead of the clean frames.
        weights: ``[B, F]``: how much each frame counts, 1 on average; None for all alike.
    """
    clean, layout = batch.clean, batch.layout
    shape = (len(clean), layout.draws * layout.frames // layout.chunk)
    levels = draw_levels(shape, random.torch, generator.preset.shift)
    if layout.bidirectional:
        levels = levels.view(len(clean), layout.draws, -1)[:, :, :1].expand(-1, -1, layout.frames).flatten(1)
    sigmas = levels.repeat_interleave(1 if layout.bidirectional else layout.chunk, 1)
    noisy, velocity = add_noise(clean.repeat(1, 1, layout.draws, 1, 1), sigmas, random.torch)
    with device.autocast():
        context = blurred_context(clean if history is None else history, random)
        guess = batch.velocity(generator, context, noisy, sigmas, batch.prompts(generator))
    error = (guess - velocity).square().mean((1, 3, 4))
    return error.mean() if weights is None else (error * weights.repeat(1, layout.draws)).mean()


def train(
    root: Path,
    *,
    preset: Preset | None = None,
    schedule: Schedule = SCHEDULE,
    seed: int = 4,
    until: int | None = None,
    stage: Stage = "ar",
    device: Device = CPU,
    wait: bool = False,
    begin: str | None = None,
) -> Run:
    """Train (or go on training) in the folder of a stage and return the run.

    Args:
        root: Training folder.
        preset: Sizes; None for those of ``tiny``.
        schedule: Length and learning rate.
        seed: Source of all randomness.
        until: Step to stop at.
        stage: Which teacher: ``first-frames`` is ``ar`` after first frames alone, with the text encoder of ``ar``.
        device: What computes.
        wait: Prepare, then wait for the latents.
        begin: Stage whose averaged weights to begin with, instead of seeded ones (``first-frames``: those of ``ar``).
    """
    generator = new_generator(root, seed, preset, device.torch)
    first_frames = stage == "first-frames"
    if begin or first_frames:
        generator.load(load_generator(root, begin or "ar"))
    generator.encoder.requires_grad_(not first_frames)
    moving = generator.transformer_parameters if first_frames else generator.parameters

    def step_loss(data: Data, random: StepRandom) -> dict[str, Tensor]:
        if first_frames:
            more = replace(data, beginnings=MORE_BEGINNINGS * data.beginnings)
            return {"loss": first_frames_error(generator, more, random)}
        return objective(generator, data, data.layout(DRAWS, bidirectional=stage == "bidirectional"), random)

    data = load_data(root, generator, device, wait=wait, warm_up=rehearsal(step_loss, moving, seed))
    run = Run(root / stage, moving, schedule, seed)
    run.train(lambda _step, random: step_loss(data, random), until=until)
    return run


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, compiles=True)
    which = parser.add_mutually_exclusive_group()
    for stage, words in (
        ("bidirectional", "train the bidirectional teacher instead"),
        ("first-frames", "go on from ar with first frames alone, the text encoder kept"),
    ):
        which.add_argument(f"--{stage}", dest="stage", action="store_const", const=stage, default="ar", help=words)
    parser.add_argument("--begin", metavar="STAGE", help="begin with the averaged weights of a stage")
    arguments = parser.parse_args()
    device = start_process(arguments)
    run = train(
        arguments.root,
        schedule=chosen_schedule(arguments, SCHEDULE, GPU_SCHEDULE),
        stage=arguments.stage,
        device=device,
        wait=arguments.wait,
        begin=arguments.begin,
    )
    raise SystemExit(run.exit_status)


if __name__ == "__main__":
    main()
