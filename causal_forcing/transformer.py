"""The causal Wan transformer: weights, and one forward pass of a chunk against a session's memory.

Shapes: latents ``[1, C, F, h, w]``, tokens ``[1, L, D]`` with ``L = F * h/2 * w/2`` in order (frame, row, column),
heads ``[1, H, L, D]``. Parameter names are those of the original Wan2.1 checkpoints.

All frames of a pass share one timestep, so everything that depends on the timestep alone (:class:`TimestepModulation`)
and on the prompt alone (:class:`TextMemory`) is computed once, outside.

Source: Wan2.1 ``wan/modules/model.py``; thu-ml/Causal-Forcing@1fc7bbc (causal inference path).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_forcing.config import TransformerConfig
from causal_forcing.geometry import LATENT_CHANNELS, PATCH
from causal_forcing.kv_cache import CachePlan, KeyValueCache, LayerMemory
from causal_forcing.packed import PackedLinear, can_pack
from causal_forcing.rope import Rotation, rotate
from causal_forcing.transfer import upload


@dataclass(frozen=True)
class TimestepModulation:
    """All that one timestep contributes to a forward pass.

    Attributes:
        blocks: ``[num_layers, 6, D]``: shift, 1 + scale, gate of self-attention, then of the feed-forward layer.
        head: ``[2, D]``: shift, 1 + scale.
    """

    blocks: Tensor
    head: Tensor


@dataclass(frozen=True)
class TextMemory:
    """Cross-attention keys and values of one prompt embedding.

    Attributes:
        keys: Per layer ``[1, H, text_len, D]``, after RMSNorm.
        values: Per layer, the same shape.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


@dataclass(frozen=True)
class ChunkContext:
    """What a forward pass reads beside its tokens: the session's memory, and the chunk's place in it.

    Attributes:
        cache: The session's keys and values; rows of ``plan`` are overwritten, its cursor is not moved.
        plan: Which rows to write and how far to read.
        rotation: Of the plan's positions.
        text: The prompt's keys and values.
    """

    cache: KeyValueCache
    plan: CachePlan
    rotation: Rotation
    text: TextMemory

    def layer(self, layer: int) -> LayerContext:
        """Return what one block reads of it."""
        memory, text = self.cache.layer(layer), self.text
        return LayerContext(memory, self.plan, self.rotation, text.keys[layer], text.values[layer])


@dataclass(frozen=True)
class LayerContext:
    """One layer's share of a :class:`ChunkContext`.

    Attributes:
        memory: The layer's keys and values; rows of ``plan`` are overwritten.
        plan: Rows that the chunk is written to and reads; the same in every layer.
        rotation: Rotary embedding of the chunk's queries and keys; the same in every layer.
        text_keys: Of the prompt, ``[1, H, text_len, D]``.
        text_values: The same shape.
    """

    memory: LayerMemory
    plan: CachePlan
    rotation: Rotation
    text_keys: Tensor
    text_values: Tensor


class RmsNorm(nn.Module):
    """RMS norm over the full width, before the split into heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised in float32, rounded to its own dtype, and only then scaled, like the reference."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


class Linear(nn.Linear):
    """A linear layer that, on a CPU, may multiply by a packed copy of its weight.

    Attributes:
        packed: The copy, or None. Compiled code does not use it: the compiler chooses layouts itself.
    """

    packed: PackedLinear | None = None

    def pack(self, tokens: int) -> None:
        """Keep a packed copy for products of about so many tokens, if this build can; the weight must not change."""
        if can_pack(self.weight):
            self.packed = PackedLinear.pack(self.weight.data, self.bias.data, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` of ``[..., in]``."""
        if self.packed is None or torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        return self.packed(x)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), Linear(config.ffn_dim, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[1, L, D]`` of the same."""
        up, activate, down = cast(tuple[Linear, nn.GELU, Linear], tuple(self))
        if up.packed is None or torch.compiler.is_compiling():
            return cast(Tensor, down(activate(up(x))))
        return cast(Tensor, down(up.packed(x, gelu=True)))


class Attention(nn.Module):
    """Projections of one attention layer; who attends to what is the caller's business."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RmsNorm(config.dim, config.eps)
        self.norm_k = RmsNorm(config.dim, config.eps)
        self.eps = config.eps
        self.joint_weight: Tensor | None
        self.joint_bias: Tensor | None
        self.joint_norm: Tensor | None
        self.joint_packed: PackedLinear | None = None
        for name in ("joint_weight", "joint_bias", "joint_norm"):
            self.register_buffer(name, None, persistent=False)

    def join(self, few_tokens: int | None = None) -> None:
        """Lay the weights of q, k and v out one after the other, so that one product makes all three; names stay.

        Args:
            few_tokens: As in :meth:`CausalTransformer.lay_out`.
        """
        layers = (self.q, self.k, self.v)
        weight = torch.cat([layer.weight.data for layer in layers])
        self.joint_weight = weight if few_tokens is None else weight.t().contiguous().t()
        self.joint_bias = torch.cat([layer.bias.data for layer in layers])
        if few_tokens is not None and can_pack(weight):
            self.joint_packed = PackedLinear.pack(weight, self.joint_bias, few_tokens)
        self.joint_norm = torch.stack([self.norm_q.weight.data, self.norm_k.weight.data])
        for layer, rows, bias in zip(layers, self.joint_weight.chunk(3), self.joint_bias.chunk(3), strict=True):
            layer.weight.data, layer.bias.data = rows, bias
        self.norm_q.weight.data, self.norm_k.weight.data = self.joint_norm

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised queries with the keys behind them, ``[1, L, 2 * H, D]``, and values ``[1, L, H, D]``."""
        if self.joint_weight is None or self.joint_norm is None:
            return torch.cat([self.queries(x), self.keys(x)], dim=2), self.values(x)
        if self.joint_packed is None or torch.compiler.is_compiling():
            joint = F.linear(x, self.joint_weight, self.joint_bias)
        else:
            joint = self.joint_packed(x)
        joint = joint.view(*x.shape[:-1], 3, -1)
        heads = F.rms_norm(joint[..., :2, :], joint.shape[-1:], None, self.eps) * self.joint_norm
        return heads.view(*x.shape[:-1], 2 * self.heads, -1), self._split(joint[..., 2, :])

    def queries(self, x: Tensor) -> Tensor:
        """Return normalised queries ``[1, L, H, D]``."""
        return self._split(self.norm_q(self.q(x)))

    def keys(self, x: Tensor) -> Tensor:
        """Return normalised keys ``[1, L, H, D]``."""
        return self._split(self.norm_k(self.k(x)))

    def values(self, x: Tensor) -> Tensor:
        """Return values ``[1, L, H, D]``."""
        return self._split(self.v(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the projected attention output ``[1, L, D]`` of heads ``[1, H, L, D]``; no mask."""
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)


class TransformerBlock(nn.Module):
    """Self-attention over the past, cross-attention to the prompt, feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, modulation: Tensor, context: LayerContext) -> Tensor:
        """Return the tokens after this block; their keys and values are written into the cache.

        Args:
            x: ``[1, L, D]``.
            modulation: ``[6, D]`` of this layer.
            context: Of this layer.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(0)
        x = torch.addcmul(x, self._attend_past(self._norm(x, shift1, scale1), context), gate1)
        x = x + self._attend_prompt(self.norm3(x), context)
        return torch.addcmul(x, self.ffn(self._norm(x, shift2, scale2)), gate2)

    def remember(self, x: Tensor, modulation: Tensor, context: LayerContext) -> None:
        """Write this block's keys and values of ``x`` into the cache and compute nothing else."""
        y, attention = self._norm(x, modulation[0], modulation[1]), self.self_attn
        keys, values = attention.keys(y), attention.values(y)
        context.memory.write_sink(keys.transpose(1, 2), context.plan)
        rotated = rotate(keys, context.rotation)
        context.memory.write(rotated.transpose(1, 2), values.transpose(1, 2), context.plan)

    def _attend_past(self, y: Tensor, context: LayerContext) -> Tensor:
        memory, plan = context.memory, context.plan
        heads, values = self.self_attn.project(y)
        if plan.sink_tokens:
            memory.write_sink(heads[:, :, self.self_attn.heads :].transpose(1, 2), plan)
        queries, keys = rotate(heads, context.rotation).transpose(1, 2).chunk(2, dim=1)
        memory.write(keys, values.transpose(1, 2), plan)
        return self.self_attn.attend(queries, *memory.read(plan))

    def _attend_prompt(self, y: Tensor, context: LayerContext) -> Tensor:
        queries = self.cross_attn.queries(y).transpose(1, 2)
        return self.cross_attn.attend(queries, context.text_keys, context.text_values)

    def _norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Return ``LayerNorm(x) * (1 + scale) + shift`` in one kernel; ``scale`` already has the 1 added."""
        return F.layer_norm(x, x.shape[-1:], scale, shift, self.eps)


class Head(nn.Module):
    """Final modulated norm and projection to a patch of velocities."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, PATCH * PATCH * LATENT_CHANNELS)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Return ``[1, L, 64]``, each token's (row, column, channel), channel fastest.

        Args:
            x: ``[1, L, D]``.
            modulation: ``[2, D]``.
        """
        out: Tensor = self.head(F.layer_norm(x, x.shape[-1:], modulation[1], modulation[0], self.eps))
        return out


class CausalTransformer(nn.Module):
    """Weights of a causal Wan transformer; holds nothing of any session."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(LATENT_CHANNELS, dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def layers(self) -> list[TransformerBlock]:
        """The blocks, typed."""
        return cast("list[TransformerBlock]", list(self.blocks))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.head.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype; that of the tokens, which low-precision weights of single layers do not change."""
        return self.head.modulation.dtype

    def lay_out(self, few_tokens: int | None = None) -> None:
        """Lay weights out for speed, in memory of their own; names, shapes and values stay, and must not change after.

        Self-attention's three projections become one product. For few tokens on a CPU the blocks' weights are packed
        for the eager passes (:mod:`causal_forcing.packed`) and transposed in memory for compiled ones: a product of 16
        tokens by 256x256 weights then takes 33 us instead of 95 (measured on two cores: small products are slow where a
        factor has to be transposed).

        Args:
            few_tokens: Tokens of a chunk if they are few and on a CPU; None otherwise.
        """
        if few_tokens is not None:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.t().contiguous().t()
            for module in self.blocks.modules():
                if isinstance(module, Linear):
                    module.pack(few_tokens)
        for block in self.layers:
            block.self_attn.join(few_tokens)

    def embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time embedding ``[N, D]`` and its block projection ``[N, 6, D]``.

        Args:
            timesteps: ``[N]``, in [0, 1000].
        """
        embedded = self.time_embedding(sinusoid(timesteps, self.config.freq_dim).to(self.dtype))
        return embedded, self.time_projection(embedded).unflatten(-1, (6, -1))

    def modulate(self, timestep: float) -> TimestepModulation:
        """Return what a timestep contributes to every block and the head; computed once per session and step."""
        embedded, projected = self.embed_time(torch.full((1,), timestep, dtype=torch.float64, device=self.device))
        blocks = torch.cat([block.modulation for block in self.layers]) + projected
        head = self.head.modulation[0] + embedded
        blocks[:, 1] += 1
        blocks[:, 4] += 1
        return TimestepModulation(blocks, torch.stack([head[0], head[1] + 1]))

    def read_text(self, embeds: Tensor) -> TextMemory:
        """Return every layer's cross-attention keys and values of a prompt; computed once per prompt.

        Args:
            embeds: ``[1, text_len, text_dim]``; padding rows are zero, and are attended to like any other.
        """
        context = self.text_embedding(upload(embeds, self.device, self.dtype))
        keys = tuple(block.cross_attn.keys(context).transpose(1, 2).contiguous() for block in self.layers)
        values = tuple(block.cross_attn.values(context).transpose(1, 2).contiguous() for block in self.layers)
        return TextMemory(keys, values)

    def forward(self, latents: Tensor, modulation: TimestepModulation, context: ChunkContext) -> Tensor:
        """Return the velocity of noisy latents, reading the past and writing this chunk's keys and values.

        The next pass with the same plan overwrites the same rows.

        Args:
            latents: ``[1, 16, F, h, w]``.
            modulation: Of the latents' timestep.
            context: Of the chunk.
        """
        x = self.embed_patches(latents)
        for i, block in enumerate(self.blocks):
            x = block(x, modulation.blocks[i], context.layer(i))
        return unpatchify(self.head(x, modulation.head), latents.shape)

    def write_context(self, latents: Tensor, modulation: TimestepModulation, context: ChunkContext) -> None:
        """Write the keys and values of clean latents; stops at the last layer's, the last that anyone reads.

        Args:
            latents: ``[1, 16, F, h, w]``.
            modulation: Of timestep 0.
            context: Of the chunk.
        """
        x, last = self.embed_patches(latents), len(self.blocks) - 1
        for i, block in enumerate(self.layers[:last]):
            x = block(x, modulation.blocks[i], context.layer(i))
        self.layers[last].remember(x, modulation.blocks[last], context.layer(last))

    def embed_patches(self, latents: Tensor) -> Tensor:
        """Return tokens ``[B, L, D]`` of latents ``[B, 16, F, h, w]``.

        Kernel and stride of the patch convolution are equal, so it is one matrix product over rearranged latents.
        """
        batch, channels, frames, height, width = latents.shape
        patches = latents.reshape(batch, channels, frames, height // PATCH, PATCH, width // PATCH, PATCH)
        tokens = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(tokens, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def rotate_sink(self, cache: KeyValueCache, rotation: Rotation) -> None:
        """Rotate the sink's kept keys and write them into their rows.

        Args:
            cache: With ``relative`` sinks.
            rotation: Of the sink's new positions.
        """
        for keys, sink in zip(cache.keys, cache.sink_keys, strict=True):
            keys[:, :, : sink.shape[2]] = rotate(sink.transpose(1, 2), rotation).transpose(1, 2)


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding ``[N, dim]`` of timesteps ``[N]`` in float64, cosines first.

    Source: Wan2.1 ``sinusoidal_embedding_1d``.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.double()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def unpatchify(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """Return latents of that shape ``[B, 16, F, h, w]`` from ``[B, L, 64]`` (row, column, channel; channel fastest)."""
    batch, channels, frames, height, width = shape
    x = patches.view(batch, frames, height // PATCH, width // PATCH, PATCH, PATCH, channels)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, channels, frames, height, width)
