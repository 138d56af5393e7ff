"""The last stage of the embedded model: weights for the package.

    python -m causal_forcing.training.export OUTPUT

Writes what :mod:`causal_forcing.weights` loads (``transformer``, ``text_encoder``, ``vae_wan``, ``vae_lightvae`` as
safetensors, ``tokenizer.json``) and ``training.json`` with steps, data hash and the latent statistics of the preset.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from causal_forcing.training.loop import DEFAULT_ROOT, read_metadata
from causal_forcing.training.model import GENERATORS, load_generator, load_stage

LIMIT_BYTES = 30 * 2**20
"""Most bytes of weights that the package ships."""


def export(root: Path, output: Path, *, stage: str = "cd") -> int:
    """Write the weights of a training folder and return their size in bytes.

    Args:
        root: Training folder.
        output: Created if missing; files in it are replaced.
        stage: Which generator, of ``GENERATORS``.

    Raises:
        ValueError: If they are larger than the package may ship.
    """
    output.mkdir(parents=True, exist_ok=True)
    generator = load_generator(root, stage)
    parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "text_encoder": {}}
    for name, value in generator.items():
        part, _, key = name.partition(".")
        parts[part][key] = value.contiguous()
    parts["vae_wan"] = load_stage(root, "vae")
    if (root / "lightvae" / "ema.safetensors").exists():
        parts["vae_lightvae"] = load_stage(root, "lightvae")
    total = sum(value.nbytes for tensors in parts.values() for value in tensors.values())
    if total > LIMIT_BYTES:
        raise ValueError(f"{total} bytes of weights exceed the {LIMIT_BYTES} that the package ships")
    for part, tensors in parts.items():
        save_file(tensors, output / f"{part}.safetensors")
    shutil.copyfile(root / "text" / "tokenizer.json", output / "tokenizer.json")
    summary = json.loads((root / "latents" / "index.json").read_text())
    stages = ("vae", "lightvae", "ar", "first-frames", "guided", stage)
    present = [name for name in stages if (root / name / "ema.safetensors").exists()]
    summary["steps"] = {name: int(read_metadata(root / name / "ema.safetensors")["step"]) for name in present}
    (output / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    return total


def main() -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write, e.g. causal_forcing/assets/tiny")
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    parser.add_argument("--stage", choices=GENERATORS, default="cd", help="which generator")
    arguments = parser.parse_args()
    size = export(arguments.root, arguments.output, stage=arguments.stage)
    print(f"wrote {size / 2**20:.1f} MiB of weights to {arguments.output}")


if __name__ == "__main__":
    main()
