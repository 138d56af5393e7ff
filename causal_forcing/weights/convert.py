"""Any readable weight file becomes one safetensors file under our names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.weights.formats import Checkpoint, TensorInfo, open_checkpoint, require_finite
from causal_forcing.weights.inspection import find_problems
from causal_forcing.weights.keys import EMBEDDING, EMBEDDING_ALIAS, Family, recognise
from causal_forcing.weights.writing import write_safetensors

_KEEP_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def convert(
    source: Path,
    destination: Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    entry: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a weight file as safetensors under our names, and return its path.

    Prefixes are stripped, names mapped, fp8 weights unscaled to bfloat16, and every value checked. The result is
    memory-mapped when it is loaded, and is found beside its original without being named.

    Args:
        source: A weight file or Diffusers-format folder of a generator, VAE or text encoder.
        destination: The new file; None puts it beside the source, with the suffix ``.safetensors``.
        dtype: What to convert floating-point tensors to; None keeps each as it is.
        entry: Top-level entry of a torch file to take.
        overwrite: Whether an existing destination may be replaced.
        on_progress: Called with the bytes written and the bytes in all.

    Raises:
        BadCheckpoint: If the source is not a whole, finite model that is known here.
        InvalidRequest: If the destination exists, is not named ``.safetensors``, or its disk is too full; or the source
            has no such entry.
    """
    destination = destination or _beside(source)
    if destination.suffix != ".safetensors":
        raise InvalidRequest("destination", str(destination), "must end in .safetensors")
    if destination.exists() and not overwrite:
        raise InvalidRequest("destination", str(destination), "must not exist yet, or overwriting must be asked for")
    checkpoint = open_checkpoint(source, entry=entry, any_entry=False)
    names = _our_names(checkpoint)
    infos = {
        ours: TensorInfo(checkpoint.tensors[name].shape, _new_dtype(checkpoint.tensors[name].dtype, dtype))
        for ours, name in names.items()
    }

    def produce(ours: str) -> Tensor:
        tensor = checkpoint.read(names[ours]).to(infos[ours].dtype)
        return require_finite(tensor, f"{source}: {names[ours]}")

    layout = recognise(checkpoint.tensors)
    metadata = {
        "format": "pt",
        "model": layout.family.value if layout else "",
        "converted_from": source.name,
        "entry": checkpoint.entry or "",
    }
    write_safetensors(destination, infos, produce, metadata=metadata, on_progress=on_progress)
    return destination


def _beside(source: Path) -> Path:
    """Return the place where the loader looks first: beside a file, or beside a folder under the folder's name."""
    return source.with_name(f"{source.name if source.is_dir() else source.stem}.safetensors")


def _our_names(checkpoint: Checkpoint) -> dict[str, str]:
    layout = recognise(checkpoint.tensors)
    if layout is None or layout.family is Family.LORA:
        held = "a LoRA, which is merged at load instead" if layout else "no model that is known here"
        raise BadCheckpoint(f"{checkpoint.path}: holds {held}", reason="CHECKPOINT_WRONG_MODEL")
    problems = find_problems(checkpoint)
    if problems:
        raise BadCheckpoint(f"{checkpoint.path}: {'; '.join(problems)}")
    names = {layout.naming.to_ours(name) or name: name for name in checkpoint.tensors}
    if layout.family is Family.TEXT_ENCODER:  # the shared embedding once, under its first name
        embedding = names.pop(EMBEDDING_ALIAS, None)
        names = {EMBEDDING: names.get(EMBEDDING, embedding or EMBEDDING), **names}
    return names


def _new_dtype(old: torch.dtype, new: torch.dtype | None) -> torch.dtype:
    if old in _KEEP_FLOAT8:
        old = torch.bfloat16
    return new if new is not None and old.is_floating_point else old
