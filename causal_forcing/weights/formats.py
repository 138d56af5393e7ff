"""Containers of tensors, opened without reading the tensors: safetensors, sharded folders, torch files.

Everything is memory-mapped, and nothing is ever unpickled but tensors: ``torch.load`` runs with ``weights_only=True``,
and a file that would need more than that is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.weights.keys import strip_prefixes

ENTRIES = ("generator_ema", "generator", "model", "state_dict", "generator_lora")
"""Top-level entries of a training checkpoint that may hold the weights, in order of preference."""

_SHARD_INDEX = ".safetensors.index.json"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("scale_weight", "weight_scale")
_NOT_WEIGHTS = ("scaled_fp8", "spiece_model")
_VALUES_AT_ONCE = 2**24
_ACTIVATION_SCALES = (".scale_input", ".input_scale")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        shape: Its shape.
        dtype: Its dtype in the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """An open weight file.

    Attributes:
        path: The file, or the folder of shards.
        format: ``safetensors``, ``sharded safetensors`` or ``torch``.
        entry: Top-level entry that the weights were found in, or None for a bare file.
        prefixes: What was stripped from names, most frequent first; empty when they are bare.
        tensors: Every weight by its stripped name.
        metadata: Text that the file carries beside its tensors.
    """

    path: Path
    format: str
    entry: str | None
    prefixes: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    _read: Callable[[str], Tensor] = field(repr=False)
    _stored_names: Mapping[str, str] = field(repr=False)
    _scale_names: Mapping[str, str] = field(repr=False)

    def read(self, name: str) -> Tensor:
        """Return a tensor, memory-mapped as the file has it; an fp8 weight becomes bfloat16, times its scale if any.

        Every e4m3 and e5m2 value is exact in bfloat16; a product with a scale is taken in float32 first.
        """
        tensor = self._read(self._stored_names[name])
        if tensor.dtype not in _FLOAT8:
            return tensor
        if name not in self._scale_names:
            return tensor.to(torch.bfloat16)
        scale = self._read(self._stored_names[self._scale_names[name]]).to(torch.float32).reshape(())
        return (tensor.to(torch.float32) * scale).to(torch.bfloat16)


def open_checkpoint(path: Path, *, entry: str | None = None, any_entry: bool = True) -> Checkpoint:
    """Open a weight file or a Diffusers-format folder without reading its tensors.

    Args:
        path: A ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` file, or a folder with one model in it.
        entry: Preferred top-level entry of a torch file.
        any_entry: Whether another entry, or a file without entries, will do.

    Raises:
        InvalidRequest: If the file lacks the entry and no other will do.
        BadCheckpoint: If it is missing, truncated, not a weight file, or contains anything but tensors.
    """
    if entry is not None and not any_entry and (path.is_dir() or path.suffix == ".safetensors"):
        raise InvalidRequest("entry", entry, f"{path} has no entries: only torch files have")
    if path.is_dir():
        stored, read, metadata, kind = _open_folder(path)
        found: str | None = None
    elif not path.is_file():
        raise BadCheckpoint(f"{path}: no such file", reason="CHECKPOINT_MISSING")
    elif path.suffix == ".safetensors":
        stored, read, metadata, kind = *_open_safetensors(path), "safetensors"
        found = None
    else:
        tensors, found = _choose_entry(path, _open_torch(path), entry, any_entry=any_entry)
        stored = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        read, metadata, kind = tensors.__getitem__, {}, "torch"
    names = _strip_all(path, stored)
    scales = _find_scales(path, names, stored)
    kept = {n: stored[s] for n, s in names.items() if n not in scales.values() and not _is_not_a_weight(n)}
    prefixes = _prefixes(names)
    return Checkpoint(path, kind, found, prefixes, kept, metadata, read, names, scales)


def require_finite(tensor: Tensor, what: str) -> Tensor:
    """Return the tensor.

    Raises:
        BadCheckpoint: If it holds NaN or infinity (reason ``CHECKPOINT_NON_FINITE``).
    """
    if tensor.numel() and tensor.is_floating_point():
        low, high = tensor.aminmax()  # one pass, no copy; NaN propagates
        if not (torch.isfinite(low) & torch.isfinite(high)).item():
            bad = sum(int((~rows.isfinite()).sum()) for rows in torch.split(tensor.flatten(), _VALUES_AT_ONCE))
            kind = str(tensor.dtype).removeprefix("torch.")
            message = f"{what} has {bad} of {tensor.numel()} values that are not finite in {kind}"
            raise BadCheckpoint(f"{message}; training diverged or the file is damaged", reason="CHECKPOINT_NON_FINITE")
    return tensor


def _is_not_a_weight(name: str) -> bool:
    return name in _NOT_WEIGHTS or name.endswith(_ACTIVATION_SCALES)


def _strip_all(path: Path, stored: Iterable[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in stored:
        stripped = strip_prefixes(name)
        if stripped in names:
            raise BadCheckpoint(f"{path}: {names[stripped]!r} and {name!r} are both {stripped!r} without prefixes")
        names[stripped] = name
    return names


def _prefixes(names: Mapping[str, str]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for stripped, stored in names.items():
        prefix = stored.removesuffix(stripped) if stored.endswith(stripped) else "(wrappers inside names)"
        if prefix:
            counts[prefix] = counts.get(prefix, 0) + 1
    return tuple(sorted(counts, key=lambda prefix: -counts[prefix]))


def _find_scales(path: Path, names: Mapping[str, str], stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the scale's name of every fp8 weight that has one."""
    scales: dict[str, str] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf not in _SCALES:
            continue
        weight, shape = f"{module}.weight", stored[names[name]].shape
        if weight not in names or stored[names[weight]].dtype not in _FLOAT8 or shape not in ((), (1,)):
            raise BadCheckpoint(
                f"{path}: {name} of shape {list(shape)} is not one scale of an fp8 weight {weight}; "
                "only unscaled fp8 and one scale per tensor are read"
            )
        scales[weight] = name
    fp8 = [n for n, s in names.items() if stored[s].dtype in _FLOAT8 and n not in _NOT_WEIGHTS]
    unscaled = [n for n in fp8 if n not in scales]
    if unscaled and (scales or "scaled_fp8" in names):
        raise BadCheckpoint(f"{path}: scaled fp8, but {len(unscaled)} fp8 weights have no scale: {unscaled[:3]}")
    return scales


_Opened = tuple[dict[str, TensorInfo], Callable[[str], Tensor], dict[str, str]]


def _open_safetensors(path: Path) -> _Opened:
    try:
        file = cast("Any", safe_open(path, framework="pt", device="cpu"))  # the library is untyped
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        unknown = {s.get_dtype() for s in slices.values()} - _SAFETENSORS_DTYPES.keys()
        if unknown:
            raise BadCheckpoint(f"{path}: holds dtypes that are not read: {', '.join(sorted(unknown))}")
        infos = {n: TensorInfo(tuple(s.get_shape()), _SAFETENSORS_DTYPES[s.get_dtype()]) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(
            f"{path}: not a whole safetensors file ({error}); it is truncated or damaged: delete it and fetch it again",
            reason="CHECKPOINT_DAMAGED",
        ) from None
    return infos, file.get_tensor, dict(file.metadata() or {})


def _open_folder(folder: Path) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor], dict[str, str], str]:
    indices = sorted(folder.glob(f"*{_SHARD_INDEX}"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return *_open_shards(folder, indices[0]), "sharded safetensors"
    if len(indices) > 1 or len(files) != 1:
        found = ", ".join(p.name for p in indices or files) or "nothing"
        raise BadCheckpoint(f"{folder}: expected one .safetensors file or one *{_SHARD_INDEX}, found {found}")
    return *_open_safetensors(files[0]), "safetensors"


def _open_shards(folder: Path, index: Path) -> _Opened:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{index}: not a shard index ({type(error).__name__}: {error})") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise BadCheckpoint(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}",
            reason="CHECKPOINT_MISSING",
        )
    opened = {shard: _open_safetensors(folder / shard) for shard in shards}
    infos: dict[str, TensorInfo] = {}
    for name, shard in weight_map.items():
        if name not in opened[shard][0]:
            raise BadCheckpoint(f"{folder}: the index puts {name!r} in {shard}, which does not have it")
        infos[name] = opened[shard][0][name]
    return infos, lambda name: opened[weight_map[name]][1](name), {}


def _open_torch(path: Path) -> object:
    try:
        if zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"refers to {refused[1]}" if refused else "contains more than tensors"
        message = f"{path}: {what} and was not opened, because unpickling it could run code"
        raise BadCheckpoint(message, reason="CHECKPOINT_UNSAFE") from None
    except Exception as error:  # noqa: BLE001  (one wrong bit in a pickle, and torch raises nearly anything)
        first = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise BadCheckpoint(f"{path}: not a whole torch file ({first})", reason="CHECKPOINT_DAMAGED") from None
    raise _not_a_zip(path)


def _not_a_zip(path: Path) -> BadCheckpoint:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"\x80"):
        message = f"{path}: a bare pickle (torch before 1.6, or not torch at all), not opened because it could run code"
        return BadCheckpoint(message, reason="CHECKPOINT_UNSAFE")
    what = "is truncated" if start == b"PK\x03\x04" else "is not a torch file"
    return BadCheckpoint(f"{path}: {what}; delete it and fetch it again", reason="CHECKPOINT_DAMAGED")


def _choose_entry(
    path: Path, content: object, entry: str | None, *, any_entry: bool
) -> tuple[dict[str, Tensor], str | None]:
    if not isinstance(content, Mapping):
        raise BadCheckpoint(f"{path}: holds a {type(content).__name__}, not named tensors")
    if entry is not None and not any_entry and not isinstance(content.get(entry), Mapping):
        entries = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
        raise InvalidRequest("entry", entry, f"{path} has {', '.join(entries) or 'no entries'}")
    for name in (entry, *ENTRIES):
        if name is not None and isinstance(content.get(name), Mapping):
            return _require_tensors(path, content[name]), name
    return _require_tensors(path, content), None


def _require_tensors(path: Path, content: Mapping[object, object]) -> dict[str, Tensor]:
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) < len(content) or not content:
        others = [f"{k} ({type(v).__name__})" for k, v in content.items() if not isinstance(v, Tensor)]
        shown = ", ".join(others[:5]) or "nothing"
        raise BadCheckpoint(
            f"{path}: holds {shown} where named tensors were expected, and none of the entries {', '.join(ENTRIES)}"
        )
    return tensors
