"""Shows the embedded model as it is: a contact sheet and an animated GIF of streams whose prompt changes midway.

    python -m causal_forcing.training.showcase FOLDER

The prompts and seeds are fixed and none is left out. ``FOLDER/embedded-model.png`` has a row a stream, under its
prompts; ``FOLDER/embedded-model.gif`` shows all of them at 16 frames a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from causal_forcing.engine import Engine
from causal_forcing.geometry import FRAMES_PER_SECOND
from causal_forcing.media import Frames, open_writer
from causal_forcing.training.cohort import Cohort, decode

STORIES = (
    ("a large red circle moving left on a black background", "a large blue circle moving left on a black background"),
    ("a small yellow square bouncing over stripes", "a small yellow square bouncing on white"),
    (
        "a large green ring moving up on a gradient background",
        "a large green ring moving down on a gradient background",
    ),
    ("a pink triangle standing still on a checkerboard", "a pink triangle moving right on a checkerboard"),
    ("a large cyan cross circling on a black background", "a large orange cross circling on a black background"),
    ("a large purple circle pulsing on white", "a large purple circle pulsing over stripes"),
    ("an orange ball going down over stripes", "an orange ball going up on a checkerboard"),
    ("a small blue square moving right on white", "a small red square moving right on white"),
)
"""Two prompts of each stream; held-out combinations of colour, shape and motion are among them."""

LATENTS = 10
"""Latent frames under each prompt."""

COLUMNS = 12
"""Pictures of a stream in the contact sheet."""

LINE = 14
"""Rows of pixels for a line of text."""


def stream(engine: Engine, stories: Sequence[tuple[str, str]]) -> list[Frames]:
    """Return the frames of each stream, ``[T, 64, 64, 3]``; the seed is its number."""
    cohort = Cohort(engine, engine.session_config(), range(len(stories)))
    chunks: list[torch.Tensor] = []
    for prompts in zip(*stories, strict=True):
        cohort.update_prompt(prompts)
        chunks += cohort.latents(LATENTS)
    return decode(engine, torch.cat(chunks, dim=2))


def contact_sheet(clips: Sequence[Frames], stories: Sequence[tuple[str, str]]) -> Image.Image:
    """Return a picture with the prompts and evenly spaced frames of every stream."""
    height, width = clips[0].shape[1:3]
    sheet = Image.new("RGB", (COLUMNS * width, len(clips) * (height + LINE)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (clip, (before, after)) in enumerate(zip(clips, stories, strict=True)):
        top = row * (height + LINE)
        pen.text((2, top + 1), before, fill="black")
        pen.text((COLUMNS * width // 2 + 2, top + 1), f"then: {after}", fill="black")
        for column, frame in enumerate(np.linspace(0, len(clip) - 1, COLUMNS).round().astype(int)):
            sheet.paste(Image.fromarray(clip[frame]), (column * width, top + LINE))
    return sheet


def wall(clips: Sequence[Frames], columns: int = 4) -> Frames:
    """Return all streams side by side, ``[T, H, W, 3]``."""
    rows = [np.concatenate(clips[start : start + columns], axis=2) for start in range(0, len(clips), columns)]
    return np.concatenate(rows, axis=1)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to, e.g. docs/media")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    clips = stream(Engine.load("tiny"), STORIES)
    contact_sheet(clips, STORIES).quantize(256).save(folder / "embedded-model.png", optimize=True)
    with open_writer(folder / "embedded-model.gif", fps=FRAMES_PER_SECOND, metadata={}) as writer:
        writer.write(wall(clips))


if __name__ == "__main__":
    main()
