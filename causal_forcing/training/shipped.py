"""Where a training goes on from the package's own weights, the other way round than :mod:`.export`.

    python -m causal_forcing.training.shipped

Writes the shipped VAEs, generator and tokenizer into a new training folder as ``vae``, ``lightvae``, ``ar`` and
``text``, each as if its stage had made it, so that the stages after them can follow. The shipped generator is a guided
one: ``guided --guidance 1`` goes on from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from causal_forcing.presets import get_preset
from causal_forcing.training.loop import DEFAULT_ROOT, mark_finished, write_tensors
from causal_forcing.weights.locate import embedded_dir


def unpack(root: Path, source: Path) -> None:
    """Write exported weights into a training folder.

    Args:
        root: Training folder.
        source: What :func:`~causal_forcing.training.export.export` wrote.

    Raises:
        FileExistsError: If the folder has weights of such a stage already.
    """
    steps = json.loads((source / "training.json").read_text())["steps"]
    generator: dict[str, Tensor] = {}
    for part in ("transformer", "text_encoder"):
        tensors = load_file(source / f"{part}.safetensors")
        generator |= {f"{part}.{name}": value for name, value in tensors.items()}
    stages = {
        "vae": load_file(source / "vae_wan.safetensors"),
        "lightvae": load_file(source / "vae_lightvae.safetensors"),
        "ar": generator,
    }
    for stage in stages:
        if (root / stage / "ema.safetensors").exists():
            raise FileExistsError(f"{root / stage} has weights already: choose another --root")
    (root / "text").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "tokenizer.json", root / "text" / "tokenizer.json")
    for stage, tensors in stages.items():
        (root / stage).mkdir(exist_ok=True)
        write_tensors(root / stage / "ema.safetensors", tensors, {"step": str(steps.get(stage, 0))})
        mark_finished(root / stage, step=steps.get(stage, 0))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="training folder to write")
    unpack(parser.parse_args().root, embedded_dir(get_preset("tiny")))


if __name__ == "__main__":
    main()
