"""A stage of the embedded model: a teacher that is guided by the caption in one pass.

    python -m causal_forcing.training.guided

Classifier-free guidance moves the velocity of a first frame from that without a caption to that with one and beyond.
Here a copy of the autoregressive teacher learns the guided velocity, so that whoever follows it needs no second pass,
and goes on learning from the data how frames that have a past go on, also after a past that it has made itself. With
``--streams`` some of its pasts are long streams of :mod:`~causal_forcing.training.streams`. Writes ``<root>/guided``,
the transformer alone.

Source: Meng et al. 2023 (arXiv 2210.03142), the first of its two stages.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_forcing.presets import Preset
from causal_forcing.tokenizer import PAD_ID
from causal_forcing.training.ar import DRAWS, Batch, Data, load_data, rehearsal, velocity_error
from causal_forcing.training.cd import fixed_prompts
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
from causal_forcing.training.model import (
    SINK_FRAMES,
    WINDOW_FRAMES,
    Generator,
    add_noise,
    draw_levels,
    load_generator,
    new_generator,
)
from causal_forcing.training.streams import Streams, load_streams
from causal_forcing.training.teacher_forcing import Layout

SCHEDULE = Schedule(steps=1000, learning_rate=8e-4, warmup=20, decay_from=0.3, ema=0.99)
GPU_SCHEDULE = Schedule(
    steps=4000, learning_rate=8e-4, warmup=50, decay_from=0.3, save_every=1000, ema=0.99, budget_s=30
)
GUIDANCE = 2.0
"""How far the velocity goes from that without a caption to that with one; 1 is there, more is beyond.

A teacher that is guided itself wants 1.
"""
FLUSHED = 0.2
"""Share of steps whose frames read few others, as they do after a switch with ``flush``."""

RESAMPLED = 1 / 3
"""Share of clips whose frames are predicted from a past that the student has made."""
RESAMPLED_FROM = 0.9
"""Highest level of noise from which the student makes it."""
RESAMPLINGS = 3
"""Most times that the past is made: first from the clips' own frames, then from what the student made of them."""

STREAMED = 1 / 2
"""Share of clips that are stretches of long streams, if there are any."""

EARLY_FRAMES, EARLY_WEIGHT = 4, 3.0
"""How many frames after a clip's first count more, and how much: a shape that they lose does not come back."""


def draw_window(random: StepRandom) -> int:
    """Return how many frames, its own among them, a frame of this step reads: sometimes few, as after a flush."""
    flushed = random.numpy.random() < FLUSHED
    return int(random.numpy.integers(SINK_FRAMES + 2, WINDOW_FRAMES)) if flushed else WINDOW_FRAMES


def frame_weights(frames: int, device: torch.device, *, early: float = EARLY_WEIGHT) -> Tensor:
    """Return how much each frame of a clip counts, ``[F]``, 1 on average.

    The first counts nothing: it is learnt from first frames by themselves, from the guided teacher.
    """
    weights = torch.ones(frames, device=device)
    weights[0] = 0
    weights[1 : 1 + EARLY_FRAMES] = early
    return weights / weights.mean()


def objective(
    teacher: Generator,
    student: Generator,
    data: Data,
    layout: Layout,
    random: StepRandom,
    *,
    guidance: float,
    streams: Streams | None = None,
) -> dict[str, Tensor]:
    """Return the student's velocity error: of clips against the data, of first frames against the guided teacher."""
    batch = data.batch(layout, random)
    history = resampled(student, batch, random, data.device)
    weights = frame_weights(layout.frames, data.device.torch).repeat(len(batch.clean), 1)
    if streams is not None:
        count = math.ceil(STREAMED * len(batch.clean))
        batch, history = with_stretches(streams, count, batch, history, random)
        weights[-count:] = frame_weights(layout.frames, data.device.torch, early=1)
    clips = velocity_error(student, batch, random, data.device, history=history, weights=weights)
    beginnings = guided_error(teacher, student, data.first_frames(random), random, data.device, guidance=guidance)
    return {"loss": clips + beginnings, "clips": clips.detach(), "beginnings": beginnings.detach()}


@torch.no_grad()
def resampled(student: Generator, batch: Batch, random: StepRandom, device: Device) -> Tensor:
    """Return the frames of a batch, of some of its clips as the student makes them: its errors are those of a stream.

    Every frame of such a clip but the first is noised to one level and predicted in one step, with the past that a
    frame has. The first stays: a stream takes more steps for it, and as the sink it can put later ones right.

    Returns:
        ``[B, 16, F, h, w]`` float32, no gradient.

    Source: Resampling Forcing (arXiv 2512.15702), in parallel over frames instead of frame by frame.
    """
    count = math.ceil(RESAMPLED * len(batch.clean))
    made = batch.leading(count, draws=1)
    clean = history = made.clean
    level = RESAMPLED_FROM * torch.rand(count, 1, generator=random.torch, device=clean.device)
    sigmas = level.expand(-1, clean.shape[2])
    with device.autocast():
        prompts = made.prompts(student)
        for _ in range(random.numpy.integers(1, RESAMPLINGS + 1)):
            noisy, _ = add_noise(clean, sigmas, random.torch)
            velocity = made.velocity(student, history, noisy, sigmas, prompts)
            guess = noisy - level[:, None, :, None, None] * velocity.float()
            history = torch.cat([clean[:, :, :1], guess[:, :, 1:]], dim=2)
    return torch.cat([history, batch.clean[count:]])


def with_stretches(
    streams: Streams, count: int, batch: Batch, history: Tensor, random: StepRandom
) -> tuple[Batch, Tensor]:
    """Return a batch and its pasts with random stretches of streams instead of the last ``count`` clips."""
    chosen = torch.from_numpy(random.numpy.integers(len(streams.values), size=count)).to(batch.clean.device)
    ids, of_frame = streams.wordings.choose(chosen, batch.clean.shape[2], random.numpy)
    kept = batch.leading(len(batch.clean) - count, draws=batch.layout.draws)
    width = max(ids.shape[1], kept.ids.shape[1])
    joined = replace(
        batch,
        clean=torch.cat([kept.clean, streams.values[chosen]]),
        ids=torch.cat([F.pad(part, (0, width - part.shape[1]), value=PAD_ID) for part in (kept.ids, ids)]),
        of_frame=torch.cat([kept.of_frame, of_frame]),
        of_clean=torch.cat([kept.of_clean, of_frame]),
    )
    return joined, torch.cat([history[:-count], streams.histories[chosen]])


def guided_error(
    teacher: Generator, student: Generator, batch: Batch, random: StepRandom, device: Device, *, guidance: float
) -> Tensor:
    """Return the student's mean squared error against the guided teacher's velocity, 0-dim."""
    clean, layout = batch.clean, batch.layout
    sigmas = draw_levels((len(clean), layout.draws * layout.frames), random.torch, student.preset.shift)
    noisy, _ = add_noise(clean.repeat(1, 1, layout.draws, 1, 1), sigmas, random.torch)
    captions = fixed_prompts(teacher, batch, device)
    with device.autocast():
        with torch.no_grad():
            target = batch.velocity(teacher, clean, noisy, sigmas, captions)
            if guidance != 1:
                empty = fixed_prompts(teacher, batch.unprompted(), device)
                target = torch.lerp(batch.velocity(teacher, clean, noisy, sigmas, empty), target, guidance)
        guess = batch.velocity(student, clean, noisy, sigmas, captions)
    return (guess - target).square().mean()


def train(
    root: Path,
    *,
    preset: Preset | None = None,
    schedule: Schedule = SCHEDULE,
    seed: int = 6,
    until: int | None = None,
    device: Device = CPU,
    wait: bool = False,
    begin: str = "ar",
    guide: str = "ar",
    guidance: float = GUIDANCE,
    with_streams: bool = False,
) -> Run:
    """Train (or go on training) in ``root/guided`` and return the run.

    Half of the first frames of the other stages are drawn a step, and twice the clips.

    Args:
        root: Training folder.
        preset: Sizes; None for those of ``tiny``.
        schedule: Length and learning rate.
        seed: Source of all randomness.
        until: Step to stop at.
        device: What computes.
        wait: Prepare, then wait for the teacher.
        begin: Stage whose averaged weights the student begins with.
        guide: Stage of the teacher of first frames, with the text encoder of ``ar``.
        guidance: See :data:`GUIDANCE`.
        with_streams: Whether some clips are stretches of :mod:`~causal_forcing.training.streams`.
    """
    teacher, student = (new_generator(root, seed, preset, device.torch) for _ in range(2))
    for generator in (teacher, student):
        generator.encoder.requires_grad_(False)
    moving = student.transformer_parameters
    text_len = student.preset.text_encoder.text_len
    streams = load_streams(root, student.tokenizer, text_len, device.torch) if with_streams else None

    def step_loss(data: Data, random: StepRandom) -> dict[str, Tensor]:
        shares = replace(data, clips=2 * data.clips, beginnings=-(-data.beginnings // 2))
        layout = data.layout(DRAWS, window=draw_window(random))
        return objective(teacher, student, shares, layout, random, guidance=guidance, streams=streams)

    data = load_data(root, student, device, wait=wait, warm_up=rehearsal(step_loss, moving, seed))
    if wait:
        wait_for(root / guide)
    teacher.load(load_generator(root, guide))
    student.load(load_generator(root, begin))
    run = Run(root / "guided", moving, schedule, seed)
    run.train(lambda _step, random: step_loss(data, random), until=until)
    return run


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, compiles=True)
    parser.add_argument("--begin", default="ar", metavar="STAGE", help="whose averaged weights the student begins with")
    parser.add_argument("--guide", default="ar", metavar="STAGE", help="whose first frames the student follows, guided")
    parser.add_argument(
        "--guidance",
        type=float,
        default=GUIDANCE,
        help="strength; 1 if the guide is guided itself (default: %(default)s)",
    )
    parser.add_argument("--streams", action="store_true", help="learn from stretches of long streams, too")
    arguments = parser.parse_args()
    device = start_process(arguments)
    run = train(
        arguments.root,
        schedule=chosen_schedule(arguments, SCHEDULE, GPU_SCHEDULE),
        device=device,
        wait=arguments.wait,
        begin=arguments.begin,
        guide=arguments.guide,
        guidance=arguments.guidance,
        with_streams=arguments.streams,
    )
    raise SystemExit(run.exit_status)


if __name__ == "__main__":
    main()
