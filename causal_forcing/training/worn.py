"""Stretches of long streams whose objects are worn, drawn instead of sampled: any shape, to any degree.

    python -m causal_forcing.training.worn

Objects wear off towards what a generator has seen with their colour and motion. In combinations that it knows this is
too rare by now to learn from (:mod:`~causal_forcing.training.streams`), in held-out ones it is not. So here the past
of a stretch lies between what it should be and the same with another shape (or at rest, if it should pulse); what
should come is as it should be. Writes shards of both to ``<root>/worn``; finished shards are kept. Nothing that is held
out is in them, worn or not.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from causal_forcing.config import VaeConfig
from causal_forcing.training import drawing, latents, whole_clip, world
from causal_forcing.training.latents import Clip
from causal_forcing.training.loop import DEFAULT_ROOT, step_rng
from causal_forcing.training.streams import BEFORE, STRETCHES
from causal_forcing.training.vae import CONFIG

WORN = 1024
SHARD_STRETCHES = 128
SEED = 29

AT_REST = 0.4
"""Share of pulsing objects that are worn towards rest instead of towards another shape."""

ROUNDED = 0.5
"""Least share of the other shapes that are circles: most objects wear off towards one."""


@dataclass(frozen=True)
class Worn:
    """A stretch of a stream.

    Attributes:
        scene: What it should show, one object.
        sink: The stream's first frame.
        right: What should be on the screen, from ``BEFORE`` latent frames before the stretch.
        wrong: The same with the object wholly worn.
    """

    scene: world.Scene
    sink: world.Segment
    right: world.Segment
    wrong: world.Segment


def draw(rng: np.random.Generator) -> Worn:
    """Return a random stretch of a random stream; advances ``rng``."""
    thing, other = world.draw_thing(rng), None
    while other is None or other.held_out:
        other = _worn(rng, thing)
    background = world.BACKGROUNDS[rng.integers(len(world.BACKGROUNDS))]
    scene, wrong = (world.Scene(background, (one,)) for one in (thing, other))
    start = world.draw_placement(rng, thing, opening=True)
    length = latents.CLIP_FRAMES - 1
    began = 4 * (1 + length * int(rng.integers(1, 1 + STRETCHES)) - BEFORE)
    frames = 4 * (length + BEFORE) - 3
    right = world.switch(world.Segment(scene, began, (start,)), scene, frames)
    return Worn(scene, world.Segment(scene, 1, (start,)), right, replace(right, scene=wrong))


def _worn(rng: np.random.Generator, thing: world.Thing) -> world.Thing:
    """Return what a thing wears off to."""
    if thing.motion == "pulsing" and rng.random() < AT_REST:
        return replace(thing, motion="still")
    if thing.shape != "circle" and rng.random() < ROUNDED:
        return replace(thing, shape="circle")
    others = [shape for shape in world.SHAPES if shape != thing.shape]
    return replace(thing, shape=others[rng.integers(len(others))])


def write_shard(path: Path, encoder: whole_clip.Parameters, config: VaeConfig, rng: np.random.Generator) -> None:
    """Draw and encode some stretches; tensors and metadata are those of :mod:`~causal_forcing.training.streams`."""
    drawn = [draw(rng) for _ in range(SHARD_STRETCHES)]
    sinks, right, wrong = (
        drawing.Pictures.of([[segment] for segment in segments])
        for segments in zip(*((one.sink, one.right, one.wrong) for one in drawn), strict=True)
    )
    shard = latents.Shard(tuple(Clip((one.scene,), latents.CLIP_FRAMES) for one in drawn), right)
    first = latents.encode(sinks, encoder, config)
    come, worn = (latents.encode(part, encoder, config)[:, :, BEFORE:] for part in (right, wrong))
    degree = torch.from_numpy(rng.random(len(drawn), dtype=np.float32)).view(-1, 1, 1, 1, 1)
    past = torch.lerp(come, worn, degree)
    latents.save_shard(path, shard, latents=torch.cat([first, come], 2), histories=torch.cat([first, past], 2))


def build(root: Path, *, stretches: int = WORN, config: VaeConfig = CONFIG) -> None:
    """Make the shards that are missing in ``root/worn``.

    Args:
        root: Training folder.
        stretches: At least so many.
        config: Of the VAE.
    """
    folder = root / "worn"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = load_file(root / "vae" / "ema.safetensors")
    for index in range(-(-stretches // SHARD_STRETCHES)):
        path = folder / f"shard-{index:04d}.safetensors"
        if not path.exists():
            write_shard(path, encoder, config, step_rng(SEED, index).numpy)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--stretches", type=int, default=WORN, help="stretches altogether (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.root, stretches=arguments.stretches)


if __name__ == "__main__":
    main()
