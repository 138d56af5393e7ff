"""A stage of the embedded model: clips of the world as latents, made once.

    python -m causal_forcing.training.latents

Renders clips, some of which change midway, encodes them with the trained VAE and writes shards of latents and scenes to
``<root>/latents``, and many more first frames by themselves to ``<root>/beginnings``. Finished shards are kept, so an
interrupted run goes on. ``index.json`` has the latents' mean and standard deviation per channel (they become the VAE's)
and a hash of the clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from causal_forcing.config import VaeConfig
from causal_forcing.geometry import TEMPORAL_STRIDE
from causal_forcing.tokenizer import Tokenizer
from causal_forcing.training import captions, drawing, whole_clip, world
from causal_forcing.training.loop import (
    CPU,
    Device,
    add_arguments,
    mark_finished,
    read_metadata,
    start_process,
    step_rng,
    wait_for,
)
from causal_forcing.training.text import token_rows
from causal_forcing.training.vae import CONFIG, as_video

CLIP_FRAMES = 16
"""Latent frames of a clip: twice the attention window, so that training sees frames evicted."""

CLIPS, GPU_CLIPS = 6144, 12288
"""Clips altogether."""

BEGINNINGS, GPU_BEGINNINGS = 24_576, 98_304
"""First frames by themselves. What an object looks like is learnt from them."""

SHARD_FRAMES = 1024
"""Latent frames of a shard."""

ENCODE_FRAMES, GPU_ENCODE_FRAMES = 32, 256
"""Latent frames that the VAE encodes together."""

SWITCH_SHARE = 0.35
"""Share of clips whose caption changes midway."""

WORDING_SEED = 11


@dataclass(frozen=True)
class Clip:
    """What a clip shows.

    Attributes:
        scenes: One, or two if it changes.
        switch: Latent frame at which the second begins (the clip's length if there is none).
    """

    scenes: tuple[world.Scene, ...]
    switch: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Clip:
        """Return a clip from :meth:`to_json`."""
        scenes = tuple(
            world.Scene(scene["background"], tuple(world.Thing(**thing) for thing in scene["things"]))
            for scene in data["scenes"]
        )
        return cls(scenes, int(data["switch"]))


def draw_clip(
    rng: np.random.Generator, *, two_objects: float, frames: int, opening: bool
) -> tuple[Clip, tuple[world.Segment, ...]]:
    """Return a random clip of ``frames`` latent frames that holds nothing held out, and what is drawn of it.

    The change falls on the first pixel frame of a latent frame, as a prompt switch does in a stream. An ``opening``
    begins at the phases at which streams begin (:data:`~causal_forcing.training.world.OPENING_PHASES`).
    """
    scene = world.draw_scene(rng, two_objects=two_objects)
    pixel_frames = 4 * frames - 3
    segments = world.draw_clip(rng, scene, pixel_frames, opening=opening)
    if frames == 1 or rng.random() >= SWITCH_SHARE:
        return Clip((scene,), frames), segments
    switch = int(rng.integers(2, frames - 1))
    at = 4 * switch - 3
    first = world.Segment(scene, at, segments[0].placements)
    second = world.switch(first, world.change(rng, scene), pixel_frames - at)
    return Clip((scene, second.scene), switch), (first, second)


def openings(clips: int) -> NDArray[np.bool_]:
    """Return which of a data set's clips of ``CLIP_FRAMES`` begin where streams do, ``[N]``: every other shard's."""
    return np.asarray(np.arange(clips) * CLIP_FRAMES // SHARD_FRAMES % 2 == 1)


@dataclass(frozen=True)
class Shard:
    """Some clips before they are drawn and encoded."""

    clips: tuple[Clip, ...]
    pictures: drawing.Pictures

    @classmethod
    def of(cls, seed: int, index: int, *, frames: int, two_objects: float) -> Shard:
        """Return the shard of a number, of clips of so many latent frames.

        First frames by themselves and the clips of every other shard are openings, the rest begin at any phase.
        """
        rng = step_rng(seed, index).numpy
        opening = frames == 1 or index % 2 == 1
        made = [
            draw_clip(rng, two_objects=two_objects, frames=frames, opening=opening)
            for _ in range(SHARD_FRAMES // frames)
        ]
        return cls(tuple(clip for clip, _ in made), drawing.Pictures.of([segments for _, segments in made]))

    @property
    def digest(self) -> str:
        """Hash of everything that decides the pixels, places to a thousandth of a pixel: no device changes it."""
        pictures = self.pictures
        places = np.rint(1000 * pictures.place.astype(np.float64)).astype(np.int64)
        parts = (pictures.background, pictures.colour, pictures.shape, places)
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def write_shard(
    path: Path, shard: Shard, parameters: Mapping[str, Tensor], config: VaeConfig, device: Device = CPU
) -> None:
    """Draw, encode and write one shard: latents ``[N, 16, F, 8, 8]`` float32, scenes, and the clips' hash."""
    save_shard(path, shard, latents=encode(shard.pictures, parameters, config, device))


def encode(
    pictures: drawing.Pictures, parameters: Mapping[str, Tensor], config: VaeConfig, device: Device = CPU
) -> Tensor:
    """Return the latents of clips that are yet to be drawn, ``[N, 16, F, 8, 8]`` float32, not normalised."""
    pixels = drawing.draw(pictures, device.torch)
    clip_frames = -(-pixels.shape[1] // TEMPORAL_STRIDE)
    together = max(2, (ENCODE_FRAMES if device.kind == "cpu" else GPU_ENCODE_FRAMES) // clip_frames)
    with torch.inference_mode(), device.autocast():
        parts = [
            whole_clip.encode(parameters, config, as_video(part))[0].float().contiguous()
            for part in torch.split(pixels, together)
        ]
    return torch.cat(parts).cpu()


def save_shard(path: Path, shard: Shard, **tensors: Tensor) -> None:
    """Write a shard's tensors, a row for each of its clips, with scenes and hash."""
    clips = json.dumps([clip.to_json() for clip in shard.clips])
    save_file(tensors, path.with_suffix(".part"), {"clips": clips, "digest": shard.digest})
    path.with_suffix(".part").replace(path)


@dataclass(frozen=True)
class Latents:
    """A data set in memory.

    Attributes:
        values: ``[N, 16, F, 8, 8]`` float32, normalised.
        clips: What each shows.
        mean: Per channel, of the latents before normalisation.
        std: Per channel.
        data_hash: Of all that decides the pixels, and of the captions' wordings.
    """

    values: Tensor
    clips: tuple[Clip, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data_hash: str


def load(
    folder: Path, device: torch.device | str = "cpu", *, like: Latents | None = None, tensor: str = "latents"
) -> Latents:
    """Return all shards of a folder, the latents on a device.

    Args:
        folder: Of the shards.
        device: Where to put the latents.
        like: Whose mean and standard deviation to normalise by; None for their own.
        tensor: Which of the shards' tensors.

    Raises:
        FileNotFoundError: If there are none.
    """
    paths = sorted(folder.glob("shard-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no latents: run python -m causal_forcing.training.latents first")
    values = torch.cat([load_file(path)[tensor].to(device) for path in paths])
    metadata = [read_metadata(path) for path in paths]
    clips = tuple(clip for entry in metadata for clip in _clips(entry))
    digest = hashlib.sha256("".join(entry["digest"] for entry in metadata).encode())
    digest.update(captions.vocabulary_hash().encode())
    if like is None:
        mean, std = tuple(values.mean((0, 2, 3, 4)).tolist()), tuple(values.std((0, 2, 3, 4)).tolist())
    else:
        mean, std = like.mean, like.std
    center, spread = (values.new_tensor(row).view(1, -1, 1, 1, 1) for row in (mean, std))
    return Latents((values - center) / spread, clips, mean, std, digest.hexdigest())


def _clips(metadata: Mapping[str, str]) -> list[Clip]:
    return [Clip.from_json(clip) for clip in json.loads(metadata["clips"])]


def _clips_of_all(folder: Path, drawn: Mapping[Path, Shard]) -> list[Clip]:
    """Return the clips of every shard, written or only drawn, in the order in which :func:`load` will return them."""
    made = {path: _clips(read_metadata(path)) for path in folder.glob("shard-*.safetensors")}
    made |= {path: list(shard.clips) for path, shard in drawn.items() if path.parent == folder}
    return [clip for path in sorted(made) for clip in made[path]]


@dataclass(frozen=True)
class Wordings:
    """Captions of clips, as token ids, in several wordings.

    Attributes:
        ids: ``[N, 2, W, L]`` int64: of each clip, before and after its change (the same scene twice if there is none).
        switch: ``[N]`` int64: the latent frame at which the second begins.
    """

    ids: Tensor
    switch: Tensor

    def choose(self, clips: Tensor, frames: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return ids ``[2 B, L]`` in random wording, and which of a clip's two captions each frame has, ``[B, F]``."""
        device = self.ids.device
        chosen = rng.integers(self.ids.shape[2], size=(len(clips), 2))
        wording = torch.from_numpy(chosen).to(device)
        ids = self.ids[clips[:, None], torch.arange(2, device=device)[None], wording]
        of_frame = torch.arange(frames, device=device)[None] >= self.switch[clips][:, None]
        return ids.flatten(0, 1), of_frame.long()


def word(
    clips: Sequence[Clip], tokenizer: Tokenizer, text_len: int, *, wordings: int, device: torch.device | str = "cpu"
) -> Wordings:
    """Return random captions of every clip; they depend on the clips alone."""
    rng = np.random.default_rng(WORDING_SEED)
    texts = [
        captions.caption(scene, rng)
        for clip in clips
        for scene in (clip.scenes[0], clip.scenes[-1])
        for _ in range(wordings)
    ]
    rows = token_rows(tokenizer, texts, text_len).view(len(clips), 2, wordings, -1)
    return Wordings(rows.to(device), torch.tensor([clip.switch for clip in clips], device=device))


def publish(folder: Path, clips: Sequence[Clip]) -> None:
    """Write what the clips will show, for stages that prepare while the latents are not there yet."""
    part = folder / "clips.part"
    part.write_text(json.dumps([clip.to_json() for clip in clips]))
    part.replace(folder / "clips.json")


def published(folder: Path) -> list[Clip]:
    """Return the clips of :func:`publish`, waiting for them."""
    wait_for(folder, "clips.json")
    return [Clip.from_json(clip) for clip in json.loads((folder / "clips.json").read_text())]


@dataclass(frozen=True)
class Series:
    """Clips of one length, in a folder of their own.

    Attributes:
        folder: Where their shards are.
        frames: Latent frames of a clip.
        clips: At least so many; a shard is always whole.
        seed: Of what they show.
        two_objects: Share of clips with two objects.
    """

    folder: Path
    frames: int
    clips: int
    seed: int
    two_objects: float

    def missing(self) -> Iterator[tuple[Path, Shard]]:
        """Iterate over the shards that are not there, with the path of each."""
        for index in range(-(-self.clips * self.frames // SHARD_FRAMES)):
            path = self.folder / f"shard-{index:04d}.safetensors"
            if not path.exists():
                yield path, Shard.of(self.seed, index, frames=self.frames, two_objects=self.two_objects)


def build(
    root: Path,
    *,
    clips: int,
    beginnings: int,
    two_objects: float,
    config: VaeConfig = CONFIG,
    seed: int = 3,
    device: Device = CPU,
    wait: bool = False,
) -> Latents:
    """Make the shards that are missing in ``root/latents`` and ``root/beginnings``, and the index; return the clips.

    Args:
        root: Training folder.
        clips: At least so many clips.
        beginnings: At least so many first frames by themselves.
        two_objects: Share of clips with two objects.
        config: Of the VAE.
        seed: Of the clips; one more for the first frames.
        device: What draws and encodes.
        wait: Draw the scenes, then wait for the VAE to be finished.
    """
    whole = Series(root / "latents", CLIP_FRAMES, clips, 2 * seed, two_objects)
    first = Series(root / "beginnings", 1, beginnings, 2 * seed + 1, two_objects)
    for series in (whole, first):
        series.folder.mkdir(parents=True, exist_ok=True)
    shards: Iterable[tuple[Path, Shard]] = chain(whole.missing(), first.missing())
    if wait:
        drawn = dict(shards)
        shards = drawn.items()
        for series in (whole, first):
            publish(series.folder, _clips_of_all(series.folder, drawn))
        wait_for(root / "vae")
    parameters = load_file(root / "vae" / "ema.safetensors", device=str(device.torch))
    for path, shard in shards:
        write_shard(path, shard, parameters, config, device)
    data = load(whole.folder, device.torch)
    hashes = {"data_hash": data.data_hash, "beginnings_hash": load(first.folder, like=data).data_hash}
    index = {"clips": len(data.clips), "mean": data.mean, "std": data.std} | hashes
    (whole.folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    mark_finished(whole.folder, clips=len(data.clips))
    return data


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--clips", type=int, help=f"clips altogether (default: {CLIPS}, on a GPU {GPU_CLIPS})")
    numbers = f"default: {BEGINNINGS}, on a GPU {GPU_BEGINNINGS}"
    parser.add_argument("--beginnings", type=int, help=f"first frames by themselves ({numbers})")
    parser.add_argument("--two-objects", type=float, default=0.1, help="share of clips with two objects")
    arguments = parser.parse_args()
    device = start_process(arguments)
    cpu = device.kind == "cpu"
    build(
        arguments.root,
        clips=arguments.clips or (CLIPS if cpu else GPU_CLIPS),
        beginnings=arguments.beginnings or (BEGINNINGS if cpu else GPU_BEGINNINGS),
        two_objects=arguments.two_objects,
        device=device,
        wait=arguments.wait,
    )


if __name__ == "__main__":
    main()
