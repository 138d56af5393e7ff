"""Stage 2 of the embedded model: clips of the world as latents, made once.

    python -m causal_forcing.training.latents

Renders clips, some of which change midway, encodes them with the trained VAE and writes shards of latents and scenes to
``<root>/latents``. Finished shards are kept, so an interrupted run goes on. ``index.json`` has the latents' mean and
standard deviation per channel (they become the VAE's) and a hash of every pixel.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from causal_forcing.config import VaeConfig
from causal_forcing.training import captions, whole_clip, world
from causal_forcing.training.loop import DEFAULT_ROOT, background_process, step_rng
from causal_forcing.training.vae import CONFIG, to_video

CLIP_FRAMES = 12
"""Latent frames of a clip: more than the attention window, so that training sees frames evicted."""

SHARD_CLIPS = 32
ENCODE_CLIPS = 4
SWITCH_SHARE = 0.35
"""Share of clips whose caption changes midway."""


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


def draw(rng: np.random.Generator, *, two_objects: float, frames: int) -> tuple[Clip, NDArray[np.uint8]]:
    """Return a random clip that holds nothing held out, and its pixels ``[1 + 4(frames - 1), 64, 64, 3]``.

    The change falls on the first pixel frame of a latent frame, as a prompt switch does in a stream.
    """
    scene = world.draw_scene(rng, two_objects=two_objects)
    pixel_frames = 4 * frames - 3
    segments = world.draw_clip(rng, scene, pixel_frames)
    if rng.random() >= SWITCH_SHARE:
        return Clip((scene,), frames), world.render(segments)
    switch = int(rng.integers(2, frames - 1))
    at = 4 * switch - 3
    first = world.Segment(scene, at, segments[0].placements)
    second = world.switch(first, world.change(rng, scene), pixel_frames - at)
    return Clip((scene, second.scene), switch), world.render((first, second))


def make_shard(
    folder: Path, index: int, parameters: Mapping[str, Tensor], config: VaeConfig, *, seed: int, two_objects: float
) -> None:
    """Render, encode and write one shard: latents ``[32, 16, F, 8, 8]`` float32, scenes, and the pixels' hash."""
    rng = step_rng(seed, index).numpy
    drawn = [draw(rng, two_objects=two_objects, frames=CLIP_FRAMES) for _ in range(SHARD_CLIPS)]
    encoded = []
    with torch.inference_mode():
        for start in range(0, SHARD_CLIPS, ENCODE_CLIPS):
            video = to_video([pixels for _, pixels in drawn[start : start + ENCODE_CLIPS]])
            encoded.append(whole_clip.encode(parameters, config, video)[0].contiguous())
    digest = hashlib.sha256(b"".join(pixels.tobytes() for _, pixels in drawn)).hexdigest()
    clips = json.dumps([clip.to_json() for clip, _ in drawn])
    path = folder / f"shard-{index:04d}.safetensors"
    save_file({"latents": torch.cat(encoded)}, path.with_suffix(".part"), {"clips": clips, "pixels": digest})
    path.with_suffix(".part").replace(path)


@dataclass(frozen=True)
class Latents:
    """A data set in memory.

    Attributes:
        values: ``[N, 16, F, 8, 8]`` float32, normalised.
        clips: What each shows.
        mean: Per channel, of the latents before normalisation.
        std: Per channel.
        data_hash: Of all pixels and of the captions' wordings.
    """

    values: Tensor
    clips: tuple[Clip, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data_hash: str


def load(folder: Path) -> Latents:
    """Return all shards of a folder.

    Raises:
        FileNotFoundError: If there are none.
    """
    from causal_forcing.training.loop import read_metadata

    paths = sorted(folder.glob("shard-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no latents: run python -m causal_forcing.training.latents first")
    values = torch.cat([load_file(path)["latents"] for path in paths])
    metadata = [read_metadata(path) for path in paths]
    clips = tuple(Clip.from_json(clip) for entry in metadata for clip in json.loads(entry["clips"]))
    digest = hashlib.sha256("".join(entry["pixels"] for entry in metadata).encode())
    digest.update(captions.vocabulary_hash().encode())
    mean, std = values.mean((0, 2, 3, 4)), values.std((0, 2, 3, 4))
    shape = (1, -1, 1, 1, 1)
    normalised = (values - mean.view(shape)) / std.view(shape)
    return Latents(normalised, clips, tuple(mean.tolist()), tuple(std.tolist()), digest.hexdigest())


def prompts_of(clips: Sequence[Clip], frames: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Return two captions per clip and which of them each frame was made under.

    Args:
        clips: The batch.
        frames: Latent frames of a clip.
        rng: Draws the wording.

    Returns:
        ``2 * len(clips)`` captions (the second repeats the scene where there is no change) and ``[B, frames]`` int64.
    """
    texts, of_frame = [], []
    for clip in clips:
        texts += [captions.caption(clip.scenes[0], rng), captions.caption(clip.scenes[-1], rng)]
        of_frame.append([int(frame >= clip.switch) for frame in range(frames)])
    return texts, torch.tensor(of_frame)


def build(root: Path, *, clips: int, two_objects: float, config: VaeConfig = CONFIG, seed: int = 3) -> Latents:
    """Make the shards that are missing in ``root/latents``, and the index; return the data set."""
    folder = root / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    parameters = load_file(root / "vae" / "ema.safetensors")
    for index in range(-(-clips // SHARD_CLIPS)):
        if not (folder / f"shard-{index:04d}.safetensors").exists():
            make_shard(folder, index, parameters, config, seed=seed, two_objects=two_objects)
    data = load(folder)
    index_data = {"clips": len(data.clips), "mean": data.mean, "std": data.std, "data_hash": data.data_hash}
    (folder / "index.json").write_text(json.dumps(index_data, indent=1) + "\n")
    return data


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    parser.add_argument("--clips", type=int, default=2048, help="clips altogether (default: %(default)s)")
    parser.add_argument("--two-objects", type=float, default=0.1, help="share of clips with two objects")
    arguments = parser.parse_args()
    background_process(arguments.root)
    build(arguments.root, clips=arguments.clips, two_objects=arguments.two_objects)


if __name__ == "__main__":
    main()
