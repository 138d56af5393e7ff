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
from causal_forcing.kv_cache import CachePlan, KeyValueCache
from causal_forcing.rope import Rotation, rotate


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


class RmsNorm(nn.Module):
    """RMS norm over the full width, before the split into heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised in float32, rounded to its own dtype, and only then scaled, like the reference."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


class Attention(nn.Module):
    """Projections of one attention layer; who attends to what is the caller's business."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RmsNorm(config.dim, config.eps)
        self.norm_k = RmsNorm(config.dim, config.eps)

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

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, modulation: Tensor, context: ChunkContext) -> Tensor:
        """Return the tokens after this block; their keys and values are written into the cache.

        Args:
            x: ``[1, L, D]``.
            modulation: ``[6, D]`` of this layer.
            context: Of the chunk.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(0)
        x = torch.addcmul(x, self._attend_past(self._norm(x, shift1, scale1), context), gate1)
        x = x + self._attend_prompt(self.norm3(x), context.text)
        return torch.addcmul(x, self.ffn(self._norm(x, shift2, scale2)), gate2)

    def remember(self, x: Tensor, modulation: Tensor, context: ChunkContext) -> None:
        """Write this block's keys and values of ``x`` into the cache and compute nothing else."""
        self._remember(self._norm(x, modulation[0], modulation[1]), context)

    def _attend_past(self, y: Tensor, context: ChunkContext) -> Tensor:
        self._remember(y, context)
        q = rotate(self.self_attn.queries(y), context.rotation).transpose(1, 2)
        return self.self_attn.attend(q, *context.cache.read(self.layer, context.plan))

    def _attend_prompt(self, y: Tensor, text: TextMemory) -> Tensor:
        q = self.cross_attn.queries(y).transpose(1, 2)
        return self.cross_attn.attend(q, text.keys[self.layer], text.values[self.layer])

    def _remember(self, y: Tensor, context: ChunkContext) -> None:
        cache, plan, rotation = context.cache, context.plan, context.rotation
        keys = self.self_attn.keys(y)
        if plan.sink_tokens:
            sink_keys = keys[:, : plan.sink_tokens].transpose(1, 2)
            cache.sink_keys[self.layer].index_copy_(2, plan.rows[: plan.sink_tokens], sink_keys)
        values = self.self_attn.values(y).transpose(1, 2)
        cache.write(self.layer, rotate(keys, rotation).transpose(1, 2), values, plan)

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
        self.blocks = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.num_layers))
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

    def pack_for_few_tokens(self) -> None:
        """Lay every linear layer's weight out transposed in memory; shapes and names stay.

        On a CPU, a product of 16 tokens by 256x256 weights then takes 33 us instead of 95; from 64 tokens on there is
        no difference (measured on two cores: small products are slow where a factor has to be transposed).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()

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
        context = self.text_embedding(embeds.to(self.device, self.dtype, non_blocking=True))
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
        for block, block_modulation in zip(self.layers, modulation.blocks, strict=True):
            x = block(x, block_modulation, context)
        return unpatchify(self.head(x, modulation.head), latents.shape)

    def write_context(self, latents: Tensor, modulation: TimestepModulation, context: ChunkContext) -> None:
        """Write the keys and values of clean latents; stops at the last layer's, the last that anyone reads.

        Args:
            latents: ``[1, 16, F, h, w]``.
            modulation: Of timestep 0.
            context: Of the chunk.
        """
        *body, last = self.layers
        x = self.embed_patches(latents)
        for block, block_modulation in zip(body, modulation.blocks[:-1], strict=True):
            x = block(x, block_modulation, context)
        last.remember(x, modulation.blocks[-1], context)

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
