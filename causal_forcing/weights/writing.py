"""Writing safetensors one tensor at a time, so that a file may be larger than memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from causal_forcing.errors import InvalidRequest
from causal_forcing.weights.formats import TensorInfo

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_ALIGNMENT = 64


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor; the file appears under its name only when it is whole.

    Args:
        path: The file.
        infos: Name, shape and dtype of every tensor, in the order they are written.
        produce: Returns one tensor; called once per name.
        metadata: Text to carry along.
        on_progress: Called after each tensor with the bytes written and the bytes in all.

    Raises:
        InvalidRequest: If the disk has too little room (field ``destination``).

    Source: the format's description in huggingface/safetensors README.
    """
    header, total = _header(infos, metadata or {})
    require_disk(path.parent, len(header) + total)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    written = 0
    try:
        with partial.open("wb") as file:
            file.write(header)
            for name, info in infos.items():
                tensor = produce(name)
                if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                    raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was announced as {info}")
                written += file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                if on_progress is not None:
                    on_progress(written, total)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raise :class:`InvalidRequest` (field ``destination``) if the disk of a folder has too little room."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise InvalidRequest(
            "destination",
            str(folder),
            f"must have {needed_bytes / 1e9:.2f} GB free, has {free / 1e9:.2f} GB",
            reason="DISK_FULL",
        )


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, info in infos.items():
        size = torch.Size(info.shape).numel() * info.dtype.itemsize
        entries[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offset
