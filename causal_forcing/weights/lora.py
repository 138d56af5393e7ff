"""Low-rank updates (LoRA), merged into the weights as they are loaded: ``W += scale * alpha / rank * B @ A``.

Source: the naming of PEFT, Kohya's sd-scripts and diffusers; NVlabs/LongLive v1.0 for its file's entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.weights.formats import Checkpoint, open_checkpoint, require_finite
from causal_forcing.weights.keys import TRANSFORMER_DIFFUSERS

MAX_SCALE = 10.0
"""Largest accepted magnitude of a LoRA's scale."""

_DOWN = r"lora_A|lora_down|lora\.down"
_UP = r"lora_B|lora_up|lora\.up"
_KEY = re.compile(rf"(?P<module>.+?)\.(?:(?P<down>{_DOWN})|(?P<up>{_UP}))(?:\.(?!bias$)[A-Za-z_]\w*?)?(?:\.weight)?")
_LEADING = re.compile(r"^(?:base_model\.|model\.|transformer\.|diffusion_model\.|module\.|unet\.)+")
_KOHYA = re.compile(r"^lora_(?:unet|transformer)_+(?:diffusion_model_|model_)?")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to merge, and how strongly.

    Attributes:
        path: Its file.
        scale: Factor, -10 to 10.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not math.isfinite(self.scale) or abs(self.scale) > MAX_SCALE:
            raise InvalidRequest("loras.scale", self.scale, f"must be from -{MAX_SCALE:g} to {MAX_SCALE:g}")


@dataclass(frozen=True)
class LoraUpdate:
    """The update of one weight, not yet multiplied out.

    Attributes:
        down: A, ``[rank, in]`` (trailing ones for a convolution).
        up: B, ``[out, rank]``.
        factor: ``scale * alpha / rank``.
    """

    down: Tensor
    up: Tensor
    factor: float

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return ``weight + factor * up @ down``, computed in float32 on the weight's device, in the weight's dtype."""
        down = self.down.flatten(1).to(weight.device, torch.float32)
        up = self.up.flatten(1).to(weight.device, torch.float32)
        merged = torch.addmm(weight.flatten(1).to(torch.float32), up, down, alpha=self.factor)
        return merged.view(weight.shape).to(weight.dtype)


def read_lora(lora: LoraFile, weight_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LoraUpdate]:
    """Return the updates of a LoRA file by the weight they belong to.

    Names are read in these styles: PEFT (``base_model.model.blocks.0.self_attn.q.lora_A.weight``), ComfyUI
    (``diffusion_model.blocks...lora_down.weight``), Kohya (``lora_unet_blocks_0_self_attn_q.lora_up.weight`` with
    ``.alpha``), diffusers (``transformer.blocks.0.attn1.to_q.lora_A.weight``). Without an alpha, alpha is the rank.

    Args:
        lora: The file.
        weight_shapes: Shape of every weight of the model, by our names.

    Raises:
        BadCheckpoint: If a tensor fits no weight, two are the same half of one update (several adapters), a pair is
            incomplete, a shape does not fit, or a value is not finite; nothing is skipped.
    """
    checkpoint = open_checkpoint(lora.path, entry="generator_lora")
    found = _collect(checkpoint, _module_names(weight_shapes))
    if all(parts.keys() == {"alpha"} for parts in found.values()):
        raise BadCheckpoint(f"{lora.path}: holds no LoRA tensors (lora_A/lora_B, lora_down/lora_up)")
    updates: dict[str, LoraUpdate] = {}
    for module, parts in found.items():
        missing = [half for half in ("down", "up") if half not in parts]
        if missing:
            raise BadCheckpoint(f"{lora.path}: {module} has no {' and no '.join(missing)} half")
        down, up = (require_finite(checkpoint.read(parts[x]), f"{lora.path}: {parts[x]}") for x in ("down", "up"))
        _require_fit(lora.path, module, (down, up), weight_shapes[f"{module}.weight"])
        rank = down.shape[0]
        alpha = _read_alpha(checkpoint, parts["alpha"]) if "alpha" in parts else float(rank)
        updates[f"{module}.weight"] = LoraUpdate(down, up, lora.scale * alpha / rank)
    return updates


def _module_names(weight_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return every way to name a module that a LoRA may update, to our name."""
    names: dict[str, str] = {}
    for weight, shape in weight_shapes.items():
        if len(shape) < 2 or not weight.endswith(".weight"):
            continue
        ours = weight.removesuffix(".weight")
        diffusers = TRANSFORMER_DIFFUSERS.to_file(weight)
        for name in (ours, *([diffusers.removesuffix(".weight")] if diffusers else [])):
            names[name] = names[name.replace(".", "_")] = ours
    return names


def _collect(checkpoint: Checkpoint, modules: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the names of each updated module's tensors, by what they are: ``down``, ``up``, ``alpha``."""
    found: dict[str, dict[str, str]] = {}
    unmatched: list[str] = []
    for name in checkpoint.tensors:
        match = _KEY.fullmatch(name)
        owner = name.removesuffix(".alpha") if name.endswith(".alpha") else match["module"] if match else ""
        ours = modules.get(_KOHYA.sub("", _LEADING.sub("", owner)))
        if ours is None:
            unmatched.append(name)
            continue
        part = "alpha" if match is None else "down" if match["down"] else "up"
        first = found.setdefault(ours, {}).setdefault(part, name)
        if first != name:
            raise BadCheckpoint(f"{checkpoint.path}: both {first} and {name} update {ours}; it must hold one adapter")
    if unmatched:
        raise BadCheckpoint(
            f"{checkpoint.path}: {len(unmatched)} of {len(checkpoint.tensors)} tensors fit no weight of this model: "
            f"{', '.join(unmatched[:3])}; it was made for another model or is another kind of adapter"
        )
    return found


def _read_alpha(checkpoint: Checkpoint, name: str) -> float:
    what = f"{checkpoint.path}: {name}"
    alpha = require_finite(checkpoint.read(name), what)
    if alpha.numel() != 1:
        raise BadCheckpoint(f"{what} is {list(alpha.shape)}, must be one number")
    return float(alpha)


def _require_fit(path: Path, module: str, pair: Iterable[Tensor], shape: tuple[int, ...]) -> None:
    down, up = pair
    rank = down.shape[0] if min(down.dim(), up.dim()) > 1 else 0
    if not rank or down.flatten(1).shape != (rank, math.prod(shape[1:])) or up.flatten(1).shape != (shape[0], rank):
        raise BadCheckpoint(
            f"{path}: {module} is {list(up.shape)} x {list(down.shape)}, which does not give {list(shape)}; "
            "it was made for another size of the model, or is damaged"
        )
