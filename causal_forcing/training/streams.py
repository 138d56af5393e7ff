"""Long streams of the generator's own, and how the world would go on instead: what drift looks like, and what is right.

    python -m causal_forcing.training.streams --stage guided

What wears off in a stream over a hundred frames no clip of the world shows, and a generator that sees its own worn past
goes on with it. So streams are sampled through the production session, the place and phase of their object is read from
the pixels of one stretch after the other, and what the world shows from there is drawn and encoded: the past as it was,
and what should have come. Writes shards of both to ``<root>/streams``; finished shards are kept. Nothing that is held
out is in them. Needs ``lightvae``, which draws what is read.

Source: Ross et al. 2011 (arXiv 1011.0686): the learner's own states with an expert's answers. The expert is the world.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from causal_forcing.config import VaeConfig
from causal_forcing.engine import Engine
from causal_forcing.tokenizer import Tokenizer
from causal_forcing.training import captions, drawing, latents, whole_clip, world
from causal_forcing.training.cohort import Cohort, decode, denormalised
from causal_forcing.training.generated import sampling_engine, sampling_parser
from causal_forcing.training.latents import Clip, Wordings
from causal_forcing.training.loop import step_rng
from causal_forcing.training.reader import MINIMUM_AREA, TRIANGLE_OFFSET, centroids, colour_layers
from causal_forcing.vae.wan import WanVae

STREAMS = 128
SHARD_STREAMS = 16
SEED = 13

STRETCHES = 66
"""Stretches of a stream, the first of them after a clip's length: a thousand latent frames.

With the stream's first frame, the sink, before it a stretch is as long as a clip.
"""

KEPT = 9
"""Stretches that are kept of as many streams as there are, on average: half of them those that are most wrong.

What has once lost its shape is rare, stays so, and is what there is most to learn from; the rest is any.
"""

BEFORE = 5
"""Latent frames before a stretch that are drawn along, for what decoder and encoder remember."""

NEAR = 2.5
"""Root mean square distance in pixels from a path of the world within which an object is on it."""

CLEARLY = 1.0
"""How many pixels nearer another phase has to be than the usual one for an object near that to be at the other."""

FAR = 5.0
"""The same from the nearest path, beyond which it is on none."""

PHASES = 64
"""Phases of a periodic motion that are tried."""

WORDINGS = 4


def start_of(
    thing: world.Thing, places: world.FloatArray, sizes: world.FloatArray, at: NDArray[np.int64]
) -> world.Placement | None:
    """Return where a stream's object should have started for the world to go on as it is seen; None if it never would.

    An object near a path that streams have is on it: phases and places that the model never saw are errors of its own.
    Far from all of these it is where it is seen: nothing jumps.

    Args:
        thing: What is seen.
        places: ``[T, 2]`` column and row of its centre in pixels, on the torus.
        sizes: ``[T]`` its size relative to the usual one.
        at: ``[T]`` pixel frames of the stream, ascending.
    """
    opening = world.OPENING_PHASES.get(thing.motion, 0.0)
    phases = opening + 2 * math.pi * np.arange(PHASES if thing.motion in world.OPENING_PHASES else 1) / PHASES
    found: list[tuple[float, float, world.Placement]] = []
    for phase in phases.tolist():
        path = world.path(thing.motion, world.Placement(0, 0, phase), int(at[-1]) + 1)[at]
        angle = 2 * math.pi * (places - path[:, :2]) / world.SIDE
        x, y = (np.angle(np.exp(1j * angle).mean(0)) / (2 * math.pi) * world.SIDE).tolist()
        off = (places - path[:, :2] - (x, y) + world.SIDE / 2) % world.SIDE - world.SIDE / 2
        distance = float(np.sqrt(np.square(off).sum(1).mean()))
        growth = world.SIZES[thing.size] * float(np.sqrt(np.square(sizes - path[:, 2]).mean()))
        found.append((distance + growth, distance, world.Placement(x, y, phase)))
    error, distance, usual = found[0]
    least, nearest, placement = min(found, key=lambda fit: fit[0])
    if distance < NEAR and error < least + CLEARLY:
        x, y = (world.PLACE_GRID * round(value / world.PLACE_GRID) for value in (usual.x, usual.y))
        return replace(usual, x=float(x), y=float(y)) if math.hypot(usual.x - x, usual.y - y) < NEAR else usual
    return placement if nearest < FAR else None


def seen(thing: world.Thing, frames: NDArray[np.uint8], first: int) -> world.Placement | None:
    """Return :func:`start_of` for an object in frames ``[T, 64, 64, 3]`` that begin at pixel frame ``first``."""
    alpha = colour_layers((frames / 255).astype(np.float32))[list(world.COLOURS).index(thing.colour)]
    area = alpha.sum((1, 2))
    there = np.nonzero(area > MINIMUM_AREA)[0]
    if 2 * len(there) < len(frames):
        return None
    places, sizes = centroids(alpha[there]), np.sqrt(area[there])
    sizes /= np.median(sizes)
    if thing.shape == "triangle":
        places[:, 1] -= TRIANGLE_OFFSET * world.SIZES[thing.size] * sizes
    return start_of(thing, places, sizes, first + there)


@dataclass(frozen=True)
class Stretch:
    """A stretch of a stream and what should have been there.

    Attributes:
        scene: What the stream should show, one object.
        went: ``[16, F, h, w]`` normalised latents, the stream's first frame and then the stretch.
        right: What should be on the screen, from :data:`BEFORE` latent frames before the stretch.
        wrong: How far its pixels are from that: their mean square difference, over the square of the object's radius.
    """

    scene: world.Scene
    went: Tensor
    right: world.Segment
    wrong: float


def stretches(engine: Engine, scene: world.Scene, stream: Tensor) -> Iterator[Stretch]:
    """Iterate over a stream's stretches.

    An object that cannot be read should be where it was going when it last could.

    Args:
        engine: Whose VAE draws what is read.
        scene: What the stream should show, one object.
        stream: ``[16, F, h, w]`` normalised latents.
    """
    start: world.Placement | None = None
    length = latents.CLIP_FRAMES - 1
    firsts = range(1 + length, stream.shape[1], length)
    pixels = decode(engine, torch.stack([stream[:, first - BEFORE : first + length] for first in firsts]))
    for first, frames in zip(firsts, pixels, strict=True):
        began = 4 * (first - BEFORE)  # decoded by itself, the first latent frame is one pixel frame, its last
        start = seen(scene.things[0], frames[-4 * length :], began + len(frames) - 4 * length) or start
        if start is None:
            continue
        right = world.switch(world.Segment(scene, began, (start,)), scene, len(frames))
        off = (drawing.draw(drawing.Pictures.of([[right]]))[0].float() - torch.from_numpy(frames))[-4 * length :]
        wrong = float(off.square().mean()) / world.SIZES[scene.things[0].size] ** 2
        yield Stretch(scene, torch.cat([stream[:, :1], stream[:, first : first + length]], 1), right, wrong)


def kept(found: Sequence[Stretch], count: int, rng: np.random.Generator) -> list[Stretch]:
    """Return so many of the stretches: half of them the most wrong ones, the rest random others."""
    ranked = sorted(found, key=lambda stretch: stretch.wrong, reverse=True)
    worst, others = ranked[: count // 2], ranked[count // 2 :]
    chosen = rng.permutation(len(others))[: count - len(worst)]
    return worst + [others[index] for index in chosen]


def write_shard(path: Path, engine: Engine, encoder: whole_clip.Parameters, rng: np.random.Generator) -> None:
    """Sample some streams and write stretches of them, and what should have been there.

    ``histories`` and ``latents`` are ``[N, 16, F, 8, 8]`` float32, not normalised, and begin with the stream's first
    frame. The metadata are those of :func:`causal_forcing.training.latents.write_shard`.
    """
    large = engine.preset.vaes["wan"]
    assert isinstance(engine.vae, WanVae)
    assert isinstance(large, VaeConfig)
    scenes = [world.draw_scene(rng) for _ in range(SHARD_STREAMS)]
    cohort = Cohort(engine, engine.session_config(), rng.integers(2**31, size=SHARD_STREAMS).tolist())
    cohort.update_prompt([captions.caption(scene, rng, size_omitted=0) for scene in scenes])  # or a stream chooses one
    made = torch.cat(list(cohort.latents(1 + (latents.CLIP_FRAMES - 1) * (1 + STRETCHES))), dim=2)
    found = [one for scene, stream in zip(scenes, made, strict=True) for one in stretches(engine, scene, stream)]
    if not found:
        raise ValueError("no object of these streams could be read: the generator has not learnt enough to teach it so")
    chosen = kept(found, KEPT * SHARD_STREAMS, rng)
    clips = tuple(Clip((stretch.scene,), latents.CLIP_FRAMES) for stretch in chosen)
    shard = latents.Shard(clips, drawing.Pictures.of([[stretch.right] for stretch in chosen]))
    right = latents.encode(shard.pictures, encoder, large)[:, :, BEFORE:]
    histories = denormalised(torch.stack([stretch.went for stretch in chosen]), engine.vae.config)
    latents.save_shard(path, shard, latents=torch.cat([histories[:, :, :1], right], 2), histories=histories)


def build(root: Path, engine: Engine, *, streams: int = STREAMS) -> None:
    """Make the shards that are missing in ``root/streams``.

    Args:
        root: Training folder.
        engine: The generator, its text encoder and a VAE of the Wan family.
        streams: At least so many.
    """
    folder = root / "streams"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = load_file(root / "vae" / "ema.safetensors")
    for index in range(-(-streams // SHARD_STREAMS)):
        path = folder / f"shard-{index:04d}.safetensors"
        if not path.exists():
            write_shard(path, engine, encoder, step_rng(SEED, index).numpy)


@dataclass(frozen=True)
class Streams:
    """The stretches of a training folder in memory.

    Attributes:
        histories: ``[N, 16, F, h, w]`` normalised latents of the streams, their first frame and then a stretch.
        values: The same with what should have been there.
        wordings: Captions of each.
    """

    histories: Tensor
    values: Tensor
    wordings: Wordings


def load_streams(root: Path, tokenizer: Tokenizer, text_len: int, device: torch.device | str = "cpu") -> Streams:
    """Return all stretches, sampled and drawn (:mod:`~causal_forcing.training.worn`), normalised as the clips are.

    Raises:
        FileNotFoundError: If there are none.
    """
    folders = [root / name for name in ("streams", "worn") if any((root / name).glob("shard-*.safetensors"))]
    if not folders:
        raise FileNotFoundError(f"{root} has no streams: run python -m causal_forcing.training.streams (or worn) first")
    clips = latents.load(root / "latents", device)

    def load(tensor: str) -> list[latents.Latents]:
        return [latents.load(folder, device, like=clips, tensor=tensor) for folder in folders]

    right, past = load("latents"), load("histories")
    shown = [clip for part in right for clip in part.clips]
    wordings = latents.word(shown, tokenizer, text_len, wordings=WORDINGS, device=device)
    return Streams(_joined(past), _joined(right), wordings)


def _joined(parts: Sequence[latents.Latents]) -> Tensor:
    return torch.cat([part.values for part in parts])


def main() -> None:
    """Run the command line."""
    parser = sampling_parser(__doc__)
    parser.add_argument("--streams", type=int, default=STREAMS, help="streams altogether (default: %(default)s)")
    arguments = parser.parse_args()
    build(arguments.root, sampling_engine(arguments, "lightvae"), streams=arguments.streams)


if __name__ == "__main__":
    main()
