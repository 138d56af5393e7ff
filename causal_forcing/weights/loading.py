"""Weights from disk into modules: built without memory, matched strictly, checked, and only then handed out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from causal_forcing.config import TinyVaeConfig, VaeConfig
from causal_forcing.errors import BadCheckpoint
from causal_forcing.presets import Preset
from causal_forcing.text_encoder import DEFAULT_CACHE_BYTES, TextEncoder, build_encoder
from causal_forcing.tokenizer import FileTokenizer, FragmentTokenizer, Tokenizer
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import TinyVae, WanVae
from causal_forcing.weights.formats import Checkpoint, TensorInfo, open_checkpoint, require_finite
from causal_forcing.weights.initialise import seeded_weights
from causal_forcing.weights.keys import EMBEDDING, EMBEDDING_ALIAS, Family, Layout, recognise
from causal_forcing.weights.locate import default_weights_dir, embedded_dir, find_part
from causal_forcing.weights.lora import LoraFile, LoraUpdate, read_lora

_SHOWN = 3
_ROWS_AT_ONCE = 4096


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Return what a device computes in: bfloat16 on CUDA (the reference's policy), float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load_transformer(
    preset: Preset,
    weights_dir: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    loras: Sequence[LoraFile] = (),
) -> CausalTransformer:
    """Return a preset's generator with its weights, and its own LoRA, if it has one, merged before ``loras``.

    Args:
        preset: Which model.
        weights_dir: Folder of weights; None means the embedded ones, or the default download folder.
        device: Where to put them.
        dtype: What to convert them to; None takes :func:`default_dtype`.
        loras: Further updates to merge, in order.

    Raises:
        BadCheckpoint: If a file is missing, damaged, of another model, or not finite.
    """
    with torch.device("meta"):
        module = CausalTransformer(preset.transformer)
    folder = _folder(preset, weights_dir)
    if folder is None:
        updates = _read_loras(loras, module)
        _fill_seeded(module, f"{preset.name}/transformer", device=device, dtype=dtype, updates=updates)
        return module
    if preset.files.lora is not None:
        loras = (LoraFile(find_part(preset, "lora", folder)), *loras)
    checkpoint = open_checkpoint(find_part(preset, "transformer", folder), entry=preset.checkpoint_key)
    load_into(module, checkpoint, Family.TRANSFORMER, device=device, dtype=dtype, updates=_read_loras(loras, module))
    return module


def load_vae(
    preset: Preset,
    vae: str = "wan",
    weights_dir: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> WanVae | TinyVae:
    """Return one of a preset's VAEs with its weights; arguments as in :func:`load_transformer`.

    Raises:
        InvalidRequest: If the preset has no such VAE (field ``vae``).
        BadCheckpoint: As :func:`load_transformer`.
    """
    module, family = build_vae(preset.vae_config(vae))
    folder = _folder(preset, weights_dir)
    part = f"vae/{vae}"
    if folder is None:
        _fill_seeded(module, f"{preset.name}/{part}", device=device, dtype=dtype)
    else:
        load_into(module, open_checkpoint(find_part(preset, part, folder)), family, device=device, dtype=dtype)
    return module


def load_text_encoder(
    preset: Preset,
    weights_dir: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> TextEncoder:
    """Return a preset's text encoder with its weights and tokenizer; arguments as in :func:`load_transformer`.

    Args:
        preset: Which model.
        weights_dir: As in :func:`load_transformer`.
        device: As in :func:`load_transformer`.
        dtype: As in :func:`load_transformer`.
        cache_bytes: Most bytes of embeddings to keep.

    Raises:
        BadCheckpoint: As :func:`load_transformer`, and if the tokenizer is missing or damaged.
    """
    module = build_encoder(preset.text_encoder, "meta")
    folder = _folder(preset, weights_dir)
    tokenizer: Tokenizer
    if folder is None:
        _fill_seeded(module, f"{preset.name}/text_encoder", device=device, dtype=dtype)
        tokenizer = FragmentTokenizer()
    else:
        tokenizer = FileTokenizer(find_part(preset, "tokenizer", folder))
        checkpoint = open_checkpoint(find_part(preset, "text_encoder", folder))
        load_into(module, checkpoint, Family.TEXT_ENCODER, device=device, dtype=dtype)
    module.encoder.embed_tokens.weight = module.shared.weight  # type: ignore[union-attr]  # one tensor, two names
    return TextEncoder(module, tokenizer, preset.text_encoder.text_len, cache_bytes=cache_bytes)


def build_vae(config: VaeConfig | TinyVaeConfig) -> tuple[WanVae | TinyVae, Family]:
    """Return a VAE of these sizes on the meta device, and what its weight files are."""
    with torch.device("meta"):
        if isinstance(config, VaeConfig):
            return WanVae(config), Family.VAE
        return TinyVae(config), Family.TINY_VAE


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    family: Family,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    updates: Sequence[Mapping[str, LoraUpdate]] = (),
) -> None:
    """Fill a module with a checkpoint's weights: every name and shape must match, and every value must be finite.

    Weights that need no conversion stay memory-mapped. The others are converted one at a time.

    Args:
        module: On the meta device; its parameters are replaced, in eval mode and without gradients.
        checkpoint: From :func:`~causal_forcing.weights.formats.open_checkpoint`.
        family: What the checkpoint must hold.
        device: Where to put the weights.
        dtype: What to convert them to; None takes :func:`default_dtype`.
        updates: Low-rank updates to merge, in order.

    Raises:
        BadCheckpoint: If a tensor is missing, left over, of another shape, or not finite.
    """
    names = match(module, checkpoint, family)
    dtype = dtype or default_dtype(device)
    loaded: dict[str, Tensor] = {}  # by the file's names, so that a tensor with two names is one
    for ours, name in names.items():
        if name in loaded:
            continue
        tensor = checkpoint.read(name)
        mine = [update[ours] for update in updates if ours in update]
        if mine:
            tensor = tensor.to(device, torch.float32)
            for update in mine:
                tensor = update.merge_into(tensor)
        loaded[name] = require_finite(tensor.to(device, dtype), f"{checkpoint.path}: {name}")
    _assign(module, {ours: loaded[name] for ours, name in names.items()})


def match(module: nn.Module, checkpoint: Checkpoint, family: Family) -> dict[str, str]:
    """Return the checkpoint's name of every tensor of a module, by the module's name.

    Raises:
        BadCheckpoint: If the two do not correspond exactly; the message counts and names the differences and says what
            the likely cause is.
    """
    layout = recognise(checkpoint.tensors)
    if layout is None or layout.family is not family:
        some = ", ".join(list(checkpoint.tensors)[:_SHOWN])
        held = f"holds a {layout.family} ({layout.style} names)" if layout else f"holds no known model (it has {some})"
        raise BadCheckpoint(f"{checkpoint.path}: {held}, not a {family}", reason="CHECKPOINT_WRONG_MODEL")
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    names = {ours: layout.naming.to_file(ours) or ours for ours in expected}
    unused = set(checkpoint.tensors) - set(names.values())
    if family is Family.TEXT_ENCODER:
        unused -= _share_embedding(checkpoint, layout, names)
    _require_same(checkpoint, expected, names, sorted(unused))
    return names


def _share_embedding(checkpoint: Checkpoint, layout: Layout, names: dict[str, str]) -> set[str]:
    """Point both names of the token embedding at the one that the file has; return the other if it has both."""
    present = [n for n in (EMBEDDING, EMBEDDING_ALIAS) if n in checkpoint.tensors]
    if layout.style == "original" or not present:
        names[EMBEDDING_ALIAS] = names[EMBEDDING]
        return set()
    names[EMBEDDING] = names[EMBEDDING_ALIAS] = present[0]
    if len(present) == 2 and not _equal(*(checkpoint.read(n) for n in present)):
        raise BadCheckpoint(f"{checkpoint.path}: {EMBEDDING} and {EMBEDDING_ALIAS} differ, but the model has one")
    return set(present)


def _equal(a: Tensor, b: Tensor) -> bool:
    pairs = zip(torch.split(a, _ROWS_AT_ONCE), torch.split(b, _ROWS_AT_ONCE), strict=False)
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in pairs)


def _require_same(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], names: Mapping[str, str], unused: list[str]
) -> None:
    tensors: Mapping[str, TensorInfo] = checkpoint.tensors
    missing = [name for name in names.values() if name not in tensors]
    reshaped = [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[ours])}"
        for ours, name in names.items()
        if name in tensors and tensors[name].shape != expected[ours]
    ]
    if not (missing or unused or reshaped):
        return
    parts = [
        f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
        for found, what in ((missing, "missing"), (unused, "left over"), (reshaped, "of another shape"))
        if found
    ]
    if reshaped:
        cause, reason = "it is another size of this model", "CHECKPOINT_WRONG_SIZE"
    elif unused:
        cause, reason = "it is another variant of this model", "CHECKPOINT_WRONG_MODEL"
    else:
        cause, reason = "it is incomplete", "CHECKPOINT_INCOMPLETE"
    raise BadCheckpoint(
        f"{checkpoint.path}: of {len(expected)} tensors expected and {len(tensors)} found, {'; '.join(parts)}; {cause}",
        reason=reason,
    )


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    module.eval().requires_grad_(False)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if left:
        raise ValueError(f"{type(module).__name__} has tensors outside its state dict: {left[:_SHOWN]}")


def _folder(preset: Preset, weights_dir: Path | None) -> Path | None:
    """Return where to load from, or None for seeded random weights."""
    if weights_dir is not None:
        return Path(weights_dir)
    if preset.embedded:
        return embedded_dir(preset) if preset.trained else None
    return default_weights_dir()


def _fill_seeded(
    module: nn.Module,
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    updates: Sequence[Mapping[str, LoraUpdate]] = (),
) -> None:
    weights = seeded_weights(module, zlib.crc32(name.encode()))
    for update in updates:
        weights |= {key: change.merge_into(weights[key]) for key, change in update.items()}
    dtype = dtype or default_dtype(device)
    _assign(module, {key: tensor.to(device, dtype) for key, tensor in weights.items()})


def _read_loras(loras: Sequence[LoraFile], module: nn.Module) -> list[dict[str, LoraUpdate]]:
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    return [read_lora(lora, shapes) for lora in loras]
