"""Clips as the generator makes them, with what the large VAE draws of them, for the small decoder to learn from.

    python -m causal_forcing.training.generated --stage guided

A generator's latents are not those of an encoder: shapes are less sharp in them, and a small decoder blurs them more.
Samples captions of random scenes (nothing that is held out) through the production session and writes shards of latents
and pixels to ``<root>/generated``; finished shards are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from causal_forcing.engine import Engine
from causal_forcing.training import captions, world
from causal_forcing.training.cohort import Cohort, decode, denormalised
from causal_forcing.training.export import export
from causal_forcing.training.loop import DEFAULT_ROOT, step_rng
from causal_forcing.training.model import GENERATORS, embedded_preset
from causal_forcing.vae.wan import WanVae

CLIPS = 512
FRAMES = 9
"""Latent frames of a clip: one period of the world's motions and the first frame. What is wrong is wrong by then."""
SHARD_CLIPS = 16
TWO_OBJECTS = 0.1
SEED = 12


def write_shard(path: Path, engine: Engine, rng: np.random.Generator) -> None:
    """Sample one shard: latents ``[N, 16, F, 8, 8]`` float32, not normalised, and pixels ``[N, T, H, W, 3]`` uint8."""
    assert isinstance(engine.vae, WanVae)
    prompts = [captions.caption(world.draw_scene(rng, two_objects=TWO_OBJECTS), rng) for _ in range(SHARD_CLIPS)]
    cohort = Cohort(engine, engine.session_config(), rng.integers(2**31, size=SHARD_CLIPS).tolist())
    cohort.update_prompt(prompts)
    latents = torch.cat(list(cohort.latents(FRAMES)), dim=2)
    frames = torch.from_numpy(np.stack(decode(engine, latents))).contiguous()
    save_file({"latents": denormalised(latents, engine.vae.config), "frames": frames}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def build(root: Path, engine: Engine, *, clips: int = CLIPS) -> None:
    """Make the shards that are missing in ``root/generated``.

    Args:
        root: Training folder.
        engine: The generator, its text encoder and the large VAE.
        clips: At least so many.
    """
    folder = root / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(-(-clips // SHARD_CLIPS)):
        path = folder / f"shard-{index:04d}.safetensors"
        if not path.exists():
            write_shard(path, engine, step_rng(SEED, index).numpy)


def load(root: Path) -> tuple[Tensor, Tensor]:
    """Return the latents and the pixels of all shards, as :func:`write_shard` writes them.

    Raises:
        FileNotFoundError: If there are none.
    """
    folder = root / "generated"
    paths = sorted(folder.glob("shard-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no clips: run python -m causal_forcing.training.generated first")
    shards = [load_file(path) for path in paths]
    latents, frames = (torch.cat([shard[name] for shard in shards]) for name in ("latents", "frames"))
    return latents, frames


def sampling_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of a stage that samples from a generator."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    parser.add_argument(
        "--stage", choices=GENERATORS, default="guided", help="whose averaged weights sample (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    return parser


def sampling_engine(arguments: argparse.Namespace, vae: str) -> Engine:
    """Return the engine of a stage with the options of :func:`sampling_parser`; its weights go to ``<root>/export``."""
    torch.set_num_threads(arguments.threads)
    folder = arguments.root / "export"
    export(arguments.root, folder, stage=arguments.stage)
    return Engine.load(embedded_preset(arguments.root), vae=vae, weights_dir=folder)


def main() -> None:
    """Run the command line."""
    parser = sampling_parser(__doc__)
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips altogether (default: %(default)s)")
    arguments = parser.parse_args()
    build(arguments.root, sampling_engine(arguments, "wan"), clips=arguments.clips)


if __name__ == "__main__":
    main()
