"""What tensors are called: the original names, and the names other libraries gave them.

Our modules use the original Wan names, and the text encoder uses transformers' names. A :class:`Naming` renames both
ways, one name at a time, and returns None for a name it does not know; nothing is ever matched by resemblance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class Family(StrEnum):
    """Kinds of weight files."""

    TRANSFORMER = "transformer"
    VAE = "vae"
    TINY_VAE = "tiny_vae"
    TEXT_ENCODER = "text_encoder"
    LORA = "lora"


class Naming(Protocol):
    """Renames tensors between a file's naming and our modules'."""

    def to_file(self, ours: str) -> str | None:
        """Return what the file calls our tensor, or None when the file's naming has no such tensor."""
        ...

    def to_ours(self, name: str) -> str | None:
        """Return what we call a tensor of the file, or None when it is unknown."""
        ...


class SameNames:
    """The file uses our names."""

    def to_file(self, ours: str) -> str | None:
        """Return the name unchanged."""
        return ours

    def to_ours(self, name: str) -> str | None:
        """Return the name unchanged."""
        return name


class TableNaming:
    """Renames by two tables: one for names outside the blocks, one for names inside a block."""

    def __init__(self, blocks: tuple[str, str], outside: Mapping[str, str], inside: Mapping[str, str]) -> None:
        """Build both directions.

        Args:
            blocks: What precedes a block's number in our names, and in the file's.
            outside: Our module names to the file's, for modules outside the blocks.
            inside: The same for modules inside a block, relative to the block.
        """
        self._forward = (blocks, outside, inside)
        backward = {file: ours for ours, file in outside.items()}, {file: ours for ours, file in inside.items()}
        self._backward = (blocks[::-1], *backward)

    def to_file(self, ours: str) -> str | None:
        """Return what the file calls our tensor."""
        return _rename(ours, *self._forward)

    def to_ours(self, name: str) -> str | None:
        """Return what we call a tensor of the file."""
        return _rename(name, *self._backward)


def _rename(name: str, blocks: tuple[str, str], outside: Mapping[str, str], inside: Mapping[str, str]) -> str | None:
    match = re.fullmatch(rf"{re.escape(blocks[0])}\.(\d+)\.(.+)", name)
    table, rest, prefix = (outside, name, "") if match is None else (inside, match[2], f"{blocks[1]}.{match[1]}.")
    if rest in table:
        return prefix + table[rest]
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{table[module]}.{leaf}" if module in table and leaf in ("weight", "bias") else None


def _attention(ours: str, theirs: str) -> dict[str, str]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}


TRANSFORMER_DIFFUSERS = TableNaming(
    ("blocks", "blocks"),
    outside={
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    },
    inside={
        **_attention("self_attn", "attn1"),
        **_attention("cross_attn", "attn2"),
        "norm3": "norm2",  # the affine norm; the reference numbers its norms differently from diffusers
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "modulation": "scale_shift_table",
    },
)
"""Names of diffusers' WanTransformer3DModel."""

_ATTENTION = "layer.0.SelfAttention"
_FFN = "layer.1.DenseReluDense"
TEXT_ENCODER_ORIGINAL = TableNaming(
    ("encoder.block", "blocks"),
    outside={"shared": "token_embedding", "encoder.final_layer_norm": "norm"},
    inside={
        **{f"{_ATTENTION}.{x}": f"attn.{x}" for x in "qkvo"},
        f"{_ATTENTION}.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2",
        f"{_FFN}.wi_0": "ffn.gate.0",
        f"{_FFN}.wi_1": "ffn.fc1",
        f"{_FFN}.wo": "ffn.fc2",
    },
)
"""Names of the original UMT5 encoder in Wan2.1; ours are transformers'."""

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESIDUAL_BACK = {theirs: ours for ours, theirs in _RESIDUAL.items()}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_ENDS_BACK = {theirs: ours for ours, theirs in _ENDS.items()}
_OUTER = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_UP_PERIOD = 4  # three residual blocks and an upsampling for each resolution


# Diffusers' place, our stage, and our number in it: factor * first number + offset + second number.
_PLACES = (
    (r"mid_block\.attentions\.0\.(.+)", "middle", 0, 1),
    (r"mid_block\.resnets\.([01])\.(.+)", "middle", 2, 0),
    (r"down_blocks\.(\d+)\.(.+)", "downsamples", 1, 0),
    (r"up_blocks\.(\d+)\.resnets\.([0-2])\.(.+)", "upsamples", _UP_PERIOD, 0),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", "upsamples", _UP_PERIOD, _UP_PERIOD - 1),
)


class VaeDiffusersNaming:
    """Names of diffusers' AutoencoderKLWan, which nests what the original numbers through."""

    def to_file(self, ours: str) -> str | None:
        """Return what diffusers calls our tensor."""
        module, _, leaf = ours.rpartition(".")
        if module in _OUTER:
            return f"{_OUTER[module]}.{leaf}"
        side, _, rest = module.partition(".")
        if side not in ("encoder", "decoder"):
            return None
        if rest in _ENDS:
            return f"{side}.{_ENDS[rest]}.{leaf}"
        match = re.fullmatch(r"(middle|downsamples|upsamples)\.(\d+)\.(.+)", rest)
        if match is None:
            return None
        stage, number, inner = match[1], int(match[2]), _RESIDUAL.get(match[3], match[3])
        place = {
            "middle": "mid_block.attentions.0" if number == 1 else f"mid_block.resnets.{number // 2}",
            "downsamples": f"down_blocks.{number}",
            "upsamples": self._up(number),
        }[stage]
        return f"{side}.{place}.{inner}.{leaf}"

    def to_ours(self, name: str) -> str | None:
        """Return what we call a tensor of diffusers'."""
        module, _, leaf = name.rpartition(".")
        if module in _OUTER_BACK:
            return f"{_OUTER_BACK[module]}.{leaf}"
        side, _, rest = module.partition(".")
        if side not in ("encoder", "decoder"):
            return None
        if rest in _ENDS_BACK:
            return f"{side}.{_ENDS_BACK[rest]}.{leaf}"
        place, inner = self._place(rest)
        return None if place is None else f"{side}.{place}.{_RESIDUAL_BACK.get(inner, inner)}.{leaf}"

    @staticmethod
    def _up(number: int) -> str:
        block, position = divmod(number, _UP_PERIOD)
        return (
            f"up_blocks.{block}.upsamplers.0" if position == _UP_PERIOD - 1 else f"up_blocks.{block}.resnets.{position}"
        )

    @staticmethod
    def _place(rest: str) -> tuple[str | None, str]:
        for pattern, stage, factor, offset in _PLACES:
            match = re.fullmatch(pattern, rest)
            if match is not None:
                numbers = [int(n) for n in match.groups()[:-1]]
                index = factor * (numbers[0] if numbers else 0) + offset + sum(numbers[1:])
                return f"{stage}.{index}", match.groups()[-1]
        return None, rest


@dataclass(frozen=True)
class Layout:
    """A recognised kind of file: what model it holds and how it names things.

    Attributes:
        family: The model.
        style: ``original``, ``diffusers`` or ``transformers``.
        naming: Between the file's names and ours.
    """

    family: Family
    style: str
    naming: Naming


_MARKERS = {
    "blocks.0.self_attn.q.weight": Layout(Family.TRANSFORMER, "original", SameNames()),
    "blocks.0.attn1.to_q.weight": Layout(Family.TRANSFORMER, "diffusers", TRANSFORMER_DIFFUSERS),
    "decoder.upsamples.0.residual.2.weight": Layout(Family.VAE, "original", SameNames()),
    "decoder.up_blocks.0.resnets.0.conv1.weight": Layout(Family.VAE, "diffusers", VaeDiffusersNaming()),
    "encoder.block.0.layer.0.SelfAttention.q.weight": Layout(Family.TEXT_ENCODER, "transformers", SameNames()),
    "blocks.0.attn.q.weight": Layout(Family.TEXT_ENCODER, "original", TEXT_ENCODER_ORIGINAL),
    "decoder.3.conv.0.weight": Layout(Family.TINY_VAE, "original", SameNames()),
}

EMBEDDING, EMBEDDING_ALIAS = "shared.weight", "encoder.embed_tokens.weight"
"""The token embedding has two names inside transformers' UMT5EncoderModel and is one tensor."""


def recognise(names: Iterable[str]) -> Layout | None:
    """Return the layout that a file's names (prefixes stripped) belong to, or None when it is none of ours."""
    present = set(names)
    for marker, layout in _MARKERS.items():
        if marker in present:
            return layout
    if any(".lora_" in name or name.endswith(".alpha") for name in present):
        return Layout(Family.LORA, "lora", SameNames())
    return None


_LEADING = ("model", "module", "diffusion_model")
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def strip_prefixes(name: str) -> str:
    """Return a name without what training wrappers add to it, in whatever order.

    Wrappers of FSDP, activation checkpointing and torch.compile are removed anywhere; ``model.``, ``module.`` and
    ``diffusion_model.`` only at the start.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _LEADING:
        del parts[0]
    return ".".join(parts)


def umt5_to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the original UMT5 encoder's weights under transformers' names, the shared embedding under both of its own.

    Raises:
        KeyError: If a name is not one of the original encoder's.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours = TEXT_ENCODER_ORIGINAL.to_ours(name)
        if ours is None:
            raise KeyError(name)
        renamed[ours] = tensor
    return {**renamed, EMBEDDING_ALIAS: renamed[EMBEDDING]}
