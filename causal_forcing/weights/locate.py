"""Where the weights of a preset lie on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from causal_forcing.errors import BadCheckpoint
from causal_forcing.presets import CheckpointFile, Preset

WEIGHTS_DIR_VARIABLE = "CAUSAL_FORCING_WEIGHTS"
"""Environment variable that names the folder of downloaded weights."""

_GENERIC = {
    "transformer": ("transformer.safetensors", "transformer.pt", "transformer"),
    "lora": ("lora.safetensors", "lora.pt"),
    "text_encoder": ("text_encoder.safetensors", "text_encoder.pth", "text_encoder"),
    "tokenizer": ("tokenizer.json", "tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json"),
    "vae/wan": ("vae_wan.safetensors", "vae_wan.pth", "vae"),
}


def default_weights_dir() -> Path:
    """Return the folder of downloads: ``$CAUSAL_FORCING_WEIGHTS``, or ``causal-forcing`` in the user's cache."""
    chosen = os.environ.get(WEIGHTS_DIR_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "causal-forcing"


def embedded_dir(preset: Preset) -> Path:
    """Return the folder inside this package that holds an embedded preset's trained weights."""
    return Path(__file__).parents[1] / "assets" / preset.name


def download_path(file: CheckpointFile, weights_dir: Path) -> Path:
    """Return where a file is downloaded to: ``weights_dir/owner/name/path``."""
    return weights_dir / file.repo / file.path


def find_part(preset: Preset, part: str, weights_dir: Path) -> Path:
    """Return the file or folder that holds one part of a preset.

    A converted ``.safetensors`` beside the original is preferred. Looked for, in this order: the download's place, the
    repository cloned under its own name, the repository's files directly in ``weights_dir``, and names that say what
    they are (``transformer.safetensors``, a Diffusers-format ``transformer`` folder, ...), which is how weights without
    public files are given.

    Args:
        preset: Whose part.
        part: ``transformer``, ``lora``, ``text_encoder``, ``tokenizer`` or ``vae/TYPE``.
        weights_dir: Folder of weights.

    Raises:
        BadCheckpoint: If it is nowhere (reason ``CHECKPOINT_MISSING``), naming the places.
    """
    candidates = list(dict.fromkeys(_candidates(preset, part, weights_dir)))
    for path in candidates:
        if path.exists():
            return path
    shown = ", ".join(str(p.relative_to(weights_dir)) for p in candidates)
    can_download = dict(preset.files).get(part) is not None
    advice = f"run `causal-forcing download {preset.name}`, or put" if can_download else "put"
    raise BadCheckpoint(
        f"{weights_dir}: no {part} of {preset.name}; {advice} one of these there: {shown}", reason="CHECKPOINT_MISSING"
    )


def _candidates(preset: Preset, part: str, weights_dir: Path) -> Iterator[Path]:
    file = dict(preset.files).get(part)
    if file is not None:
        for base in (weights_dir / file.repo, weights_dir / file.repo.rpartition("/")[2], weights_dir):
            path = base / file.path
            if part != "tokenizer":
                yield path.with_suffix(".safetensors")
            yield path
    stem = part.replace("/", "_")
    for name in _GENERIC.get(part, (f"{stem}.safetensors", f"{stem}.pth")):
        yield weights_dir / name
