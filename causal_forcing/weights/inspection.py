"""What is in a weight file, without loading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from causal_forcing.config import TextEncoderConfig, TinyVaeConfig, TransformerConfig, VaeConfig
from causal_forcing.errors import BadCheckpoint
from causal_forcing.presets import PRESETS, Preset
from causal_forcing.text_encoder import build_encoder
from causal_forcing.transformer import CausalTransformer
from causal_forcing.weights.formats import Checkpoint, TensorInfo, open_checkpoint, require_finite
from causal_forcing.weights.keys import Family, Layout, recognise
from causal_forcing.weights.loading import build_vae, match

ModelConfig = TransformerConfig | VaeConfig | TinyVaeConfig | TextEncoderConfig

_HEAD_DIM = 128  # of every Wan transformer; a checkpoint does not say how many heads it has


@dataclass(frozen=True)
class Inspection:
    """What was found in a weight file.

    Attributes:
        path: The file or folder.
        format: Container, or None when it could not be opened.
        family: Model it holds (``transformer``, ``vae``, ``tiny_vae``, ``text_encoder``, ``lora``), or None.
        style: Whose names it uses (``original``, ``diffusers``, ``transformers``, ``lora``), or None.
        entry: Top-level entry of a torch file that holds the weights, or None.
        prefixes: What training wrappers put before names.
        tensor_count: Tensors.
        parameter_count: Values in them.
        size_bytes: Bytes of all tensors.
        dtypes: Tensors of each dtype.
        config: Sizes of the model as far as the tensors show them, or None.
        presets: Presets whose sizes fit.
        metadata: Text that the file carries.
        problems: Why it would not load; empty when it would.
    """

    path: Path
    format: str | None
    family: str | None
    style: str | None
    entry: str | None
    prefixes: tuple[str, ...]
    tensor_count: int
    parameter_count: int
    size_bytes: int
    dtypes: Mapping[str, int]
    config: ModelConfig | None
    presets: tuple[str, ...]
    metadata: Mapping[str, str]
    problems: tuple[str, ...]


def inspect_file(path: Path, *, entry: str | None = None, check_values: bool = False) -> Inspection:
    """Return what is in a weight file or folder; a file that would not load is described, not refused.

    Args:
        path: The file or folder.
        entry: Top-level entry of a torch file to look at; None takes the first that is known.
        check_values: Also read every tensor and look for NaN and infinity.

    Raises:
        InvalidRequest: If the file has no such entry.
    """
    try:
        checkpoint = open_checkpoint(path, entry=entry, any_entry=False)
    except BadCheckpoint as error:
        return Inspection(path, None, None, None, None, (), 0, 0, 0, {}, None, (), {}, (error.message,))
    layout = recognise(checkpoint.tensors)
    problems = find_problems(checkpoint)
    if check_values:
        problems += _find_bad_values(checkpoint)
    infos = checkpoint.tensors.values()
    config = infer_config(checkpoint.tensors, layout)
    return Inspection(
        path=path,
        format=checkpoint.format,
        family=layout.family.value if layout else None,
        style=layout.style if layout else None,
        entry=checkpoint.entry,
        prefixes=checkpoint.prefixes,
        tensor_count=len(checkpoint.tensors),
        parameter_count=sum(_count(info) for info in infos),
        size_bytes=sum(_count(info) * info.dtype.itemsize for info in infos),
        dtypes=dict(Counter(str(info.dtype).removeprefix("torch.") for info in infos)),
        config=config,
        presets=_fitting_presets(config),
        metadata=checkpoint.metadata,
        problems=tuple(problems),
    )


def find_problems(checkpoint: Checkpoint) -> list[str]:
    """Return why a checkpoint is not a whole model of the sizes that its own tensors show; empty when it is."""
    layout = recognise(checkpoint.tensors)
    if layout is None:
        some = ", ".join(list(checkpoint.tensors)[:3])
        return [f"holds no model that is known here; its first tensors are {some}"]
    if layout.family is Family.LORA:
        return []
    config = infer_config(checkpoint.tensors, layout)
    if config is None:
        return [f"looks like a {layout.family}, but lacks the tensors that show its sizes"]
    try:
        match(_build(config), checkpoint, layout.family)
    except BadCheckpoint as error:
        return [error.message.removeprefix(f"{checkpoint.path}: ")]
    return []


def infer_config(tensors: Mapping[str, TensorInfo], layout: Layout | None) -> ModelConfig | None:
    """Return the sizes that a file's tensors show, or None when too few of them are there."""
    if layout is None or layout.family not in _READERS:
        return None
    ours = {layout.naming.to_ours(name) or name: info.shape for name, info in tensors.items()}
    try:
        return _READERS[layout.family](ours)
    except (KeyError, IndexError, ValueError):
        return None


_Shapes = Mapping[str, tuple[int, ...]]


def _transformer_config(shapes: _Shapes) -> TransformerConfig:
    dim = shapes["patch_embedding.weight"][0]
    sizes = {
        "dim": dim,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": _layers(shapes, "blocks"),
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "text_dim": shapes["text_embedding.0.weight"][1],
    }
    for preset in PRESETS.values():
        known = preset.transformer
        if all(getattr(known, field) == value for field, value in sizes.items()):
            return known
    return TransformerConfig(num_heads=max(1, dim // _HEAD_DIM), **sizes)


def _vae_config(shapes: _Shapes) -> VaeConfig:
    resolutions = len(VaeConfig().dim_mult)
    per_resolution = (_layers(shapes, "decoder.upsamples") - (resolutions - 1)) // resolutions
    return VaeConfig(
        base_dim=shapes["encoder.conv1.weight"][0],
        num_res_blocks=per_resolution - 1,
        z_dim=shapes["conv2.weight"][0],
    )


def _tiny_vae_config(shapes: _Shapes) -> TinyVaeConfig:
    convolutions = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
    first, second, third, fourth = (shapes[name][0] for name in convolutions)
    return TinyVaeConfig(channels=(first, second, third, fourth))


def _text_encoder_config(shapes: _Shapes) -> TextEncoderConfig:
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    embedding = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    return TextEncoderConfig(
        vocab_size=embedding[0],
        d_model=embedding[1],
        d_kv=shapes[f"{attention}.q.weight"][0] // heads,
        num_heads=heads,
        d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_layers=_layers(shapes, "encoder.block"),
        num_buckets=buckets,
    )


_READERS: Mapping[Family, Callable[[_Shapes], ModelConfig]] = {
    Family.TRANSFORMER: _transformer_config,
    Family.VAE: _vae_config,
    Family.TINY_VAE: _tiny_vae_config,
    Family.TEXT_ENCODER: _text_encoder_config,
}


def _layers(shapes: _Shapes, blocks: str) -> int:
    prefix = f"{blocks}."
    return 1 + max(int(name.removeprefix(prefix).partition(".")[0]) for name in shapes if name.startswith(prefix))


def _build(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        if isinstance(config, TransformerConfig):
            return CausalTransformer(config)
        if isinstance(config, TextEncoderConfig):
            return build_encoder(config, "meta")
    return build_vae(config)[0]


def _fitting_presets(config: ModelConfig | None) -> tuple[str, ...]:
    def sizes(known: ModelConfig) -> tuple[object, ...]:
        """Return what tensors show; latent statistics, scales and limits they do not."""
        if isinstance(known, VaeConfig):
            return known.base_dim, known.num_res_blocks, known.z_dim
        if isinstance(known, TinyVaeConfig):
            return known.channels
        if isinstance(known, TextEncoderConfig):
            return known.vocab_size, known.d_model, known.d_kv, known.num_heads, known.d_ff, known.num_layers
        return (known,)

    def fits(preset: Preset) -> bool:
        parts = (preset.transformer, preset.text_encoder, *preset.vaes.values())
        return any(type(part) is type(config) and sizes(part) == sizes(config) for part in parts)

    return () if config is None else tuple(name for name, preset in PRESETS.items() if fits(preset))


def _find_bad_values(checkpoint: Checkpoint) -> list[str]:
    problems = []
    for name in checkpoint.tensors:
        try:
            require_finite(checkpoint.read(name), name)
        except BadCheckpoint as error:
            problems.append(error.message)
    return problems


def _count(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel()
