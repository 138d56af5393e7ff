"""The transformer's forward pass for training: many frames, each at its own timestep, under a block-causal mask.

One pass sees ``[clean frames | noisy frames of draw 1 | of draw 2 | ...]``. A clean frame attends to the clean frames
up to itself; a noisy frame attends to the clean frames before it and to itself. All draws share the clean context, so a
draw costs less than a clip. It computes with the modules of :class:`~causal_forcing.transformer.CausalTransformer`, and
a test holds every output equal to the cached inference path.

Shapes: latents ``[B, 16, F, h, w]``, tokens ``[B, L, D]``, heads ``[B, H, L, D]``; a pass has
``S = (1 + draws) * F`` frames.

Source: Causal Forcing (arXiv 2602.02214), section on teacher forcing; who sees whom is as in Self-Forcing's
``_prepare_teacher_forcing_mask``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_forcing.geometry import PATCH
from causal_forcing.rope import RotaryEmbedding, Rotation, rotate
from causal_forcing.training.model import WINDOW_FRAMES
from causal_forcing.transformer import Attention, CausalTransformer, TransformerBlock, unpatchify


@dataclass(frozen=True)
class Layout:
    """Who attends to whom in one pass.

    Attributes:
        frames: Latent frames of a clip, a multiple of ``chunk``.
        draws: Noisy copies of every frame; 0 for a pass over clean frames alone.
        window: Frames an attention sees, the frame itself included; None for all.
        chunk: Frames generated together; they attend to each other both ways.
        sink: First frames of a clip that stay in the window, at the positions before the oldest of the rest.
        bidirectional: Whether noisy frames attend to all noisy frames of their draw and to no clean ones.
    """

    frames: int
    draws: int
    window: int | None = None
    chunk: int = 1
    sink: int = 0
    bidirectional: bool = False

    @property
    def group(self) -> int:
        """Frames that attend to each other both ways: a chunk, or all of them."""
        return self.frames if self.bidirectional else self.chunk

    @property
    def reach(self) -> int:
        """How many frames before a group are looked at; of those, :meth:`past` are seen.

        Windows smaller than the model's look as far as it, so that their passes have the same shapes.
        """
        furthest = self.frames if self.window is None else max(self.window, WINDOW_FRAMES)
        return max(0, min(furthest, self.frames) - self.group)

    def starts(self) -> Tensor:
        """Return the first frame of each group, ``[G]`` int64."""
        return self.group * torch.arange(self.frames // self.group)

    def past(self) -> Tensor:
        """Return which frames before a group its frames attend to.

        Returns:
            ``[G, sink + reach]`` bool: for each group, the sink once others have been evicted, then the clean frames
            that precede the group, the oldest first.
        """
        start = self.starts()[:, None]
        index = start - self.reach + torch.arange(self.reach)
        seen = index >= 0
        evicts = torch.zeros_like(start, dtype=torch.bool)
        if self.window is not None:
            evicts = start + self.group > self.window
            seen &= ~evicts | (start + self.group - index <= self.window - self.sink)
        return torch.cat([evicts.expand(-1, self.sink), seen], dim=1)

    def sink_positions(self) -> list[int]:
        """Return the positions at which each group sees the sink, if it does: ``G * sink`` of them."""
        window = self.frames if self.window is None else self.window
        first = (self.starts() + self.group - window).clamp(min=0)
        positions: list[int] = (first[:, None] + torch.arange(self.sink)).flatten().tolist()
        return positions


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch of clips.

    Attributes:
        embeds: ``[B, P, text_len, text_dim]``: up to ``P`` prompts a clip.
        of_frame: ``[B, F]`` int64: which of them each frame was made under.
        of_clean: ``[B, F]`` int64: which of them each clean frame is read under, where that is another one; a switch
            that re-reads the past (``recache``) reads all of it under the new prompt.
    """

    embeds: Tensor
    of_frame: Tensor
    of_clean: Tensor | None = None


def predict(
    model: CausalTransformer,
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    prompts: Prompts,
    *,
    layout: Layout,
    rotary: RotaryEmbedding,
    block_pass: BlockPass | None = None,
) -> Tensor:
    """Return the velocity of every noisy frame, ``[B, 16, draws * F, h, w]``.

    Args:
        model: Its modules are used as they are; gradients flow.
        clean: ``[B, 16, F, h, w]`` normalised latents: the context, at timestep 0.
        noisy: ``[B, 16, draws * F, h, w]``, draw by draw.
        timesteps: ``[B, draws * F]`` in (0, 1000].
        prompts: Of each clip.
        layout: Of this pass.
        rotary: For this frame size.
        block_pass: What runs a block: None for the function below, or a compiled form of it (:func:`compiled`).
    """
    block_pass = block_pass or _block
    latents = torch.cat([clean, noisy], dim=2)
    batch, _, total, height, width = latents.shape
    tokens = (height // PATCH) * (width // PATCH)
    times = torch.cat([timesteps.new_zeros(batch, clean.shape[2]), timesteps], dim=1)
    with torch.autocast(latents.device.type, enabled=False):
        embedded, projected = model.embed_time(times.flatten())
    memory = _Memory(
        projected.view(batch, total, 1, 6, -1),
        _rotation(rotary, layout),
        _sink_rotation(rotary, layout),
        tokens,
        layout.group * tokens,
        layout.sink * tokens,
        _past_bias(layout, tokens, latents.device),
        model.text_embedding(prompts.embeds.flatten(1, 2)),
        _prompt_mask(prompts, 1 + layout.draws, tokens),
    )
    x = model.embed_patches(latents).float().view(batch, total, tokens, -1)
    for block in model.layers:
        x = block_pass(block, x, memory)
    shift, scale = (model.head.modulation + embedded.view(batch, total, 1, -1)).unsqueeze(2).unbind(3)
    with torch.autocast(latents.device.type, enabled=False):
        x = model.head.head(_modulate(x.float(), shift, scale, model.head.eps)).flatten(1, 2)
    return unpatchify(x, latents.shape)[:, :, layout.frames :]


@cache
def _past_bias(layout: Layout, tokens: int, device: torch.device) -> Tensor:
    """Return what is added to the scores of the past, ``[G, 1, 1, (sink + reach) * T]``: nothing, or minus infinity."""
    seen = layout.past().repeat_interleave(tokens, 1)
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None].to(device)


@cache
def _rotation(rotary: RotaryEmbedding, layout: Layout) -> Rotation:
    return rotary.rotation([*range(layout.frames)] * (1 + layout.draws))


@cache
def _sink_rotation(rotary: RotaryEmbedding, layout: Layout) -> Rotation | None:
    return rotary.rotation(layout.sink_positions()) if layout.sink else None


@dataclass(frozen=True)
class _Memory:
    """What every block reads beside its tokens ``[B, S, T, D]``."""

    projected: Tensor  # [B, S, 1, 6, D]
    rotation: Rotation
    sink_rotation: Rotation | None  # of G*s tokens, if there are any
    tokens: int  # T, of a frame
    group: int  # n, tokens of the frames that attend to each other both ways
    sink: int  # s, tokens of the frames that stay in the window
    past_bias: Tensor  # [G, 1, 1, m], of the s tokens of the sink and the m - s before each of G groups
    text: Tensor  # [B, P*text_len, D]
    text_mask: Tensor | None  # [B, 1, S*T, P*text_len]


def _prompt_mask(prompts: Prompts, copies: int, tokens: int) -> Tensor | None:
    count, rows = prompts.embeds.shape[1:3]
    if count == 1:
        return None
    of_clean = prompts.of_frame if prompts.of_clean is None else prompts.of_clean
    of_token = torch.cat([of_clean, prompts.of_frame.repeat(1, copies - 1)], dim=1).repeat_interleave(tokens, 1)
    of_row = torch.arange(count, device=of_token.device).repeat_interleave(rows)
    return (of_token[:, :, None] == of_row)[:, None]


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the output ``[B, L, D]`` of queries ``[B, L, H, D]`` and keys and values ``[B, M, H, D]``."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


def _self_attend(attention: Attention, y: Tensor, memory: _Memory) -> Tensor:
    """Return the output of a whole pass, ``[B, S*T, D]``: each group reads the sink, the frames before it, itself.

    The clean frames are one more copy beside the draws. All copies of a group read the same past.
    """
    raw, v = attention.keys(y), attention.values(y)
    q, k = (rotate(part, memory.rotation) for part in (attention.queries(y), raw))
    groups, sink = memory.past_bias.shape[0], memory.sink
    past = memory.past_bias.shape[-1] - sink
    clean, step = groups * memory.group, memory.group // memory.tokens

    def by_group(part: Tensor) -> Tensor:  # [B, G, H, copies, n, D/H]
        return part.view(len(part), -1, groups, memory.group, *part.shape[2:]).permute(0, 2, 4, 1, 3, 5)

    def of_past(part: Tensor, first: Tensor, rotation: Rotation | None = None) -> Tensor:  # [B, G, H, m, D/H]
        frames = F.pad(part[:, :clean], (0, 0, 0, 0, past, 0)).view(len(part), -1, memory.tokens, *part.shape[2:])
        # Slices, not Tensor.unfold: as torch 2.13 compiles its backward pass for a CPU, threads overwrite each other.
        windows = torch.cat([frames[:, i : i + clean // memory.tokens : step] for i in range(past // memory.tokens)], 2)
        sinks = first[:, :sink].repeat(1, groups, 1, 1)
        sinks = sinks if rotation is None else rotate(sinks, rotation)
        sinks = sinks.view(len(part), groups, sink, *part.shape[2:]).transpose(2, 3)
        return torch.cat([sinks, windows.transpose(2, 3)], dim=3)

    queries, keys, values = (by_group(part) for part in (q * q.shape[-1] ** -0.5, k, v))
    own = queries @ keys.transpose(-1, -2)
    if not past:
        out = own.softmax(-1) @ values
    else:
        earlier = queries.flatten(3, 4) @ of_past(k, raw, memory.sink_rotation).transpose(-1, -2) + memory.past_bias
        scores = torch.cat([earlier.view(*own.shape[:-1], -1), own], dim=-1)
        on_past, on_own = torch.split(scores.softmax(-1).to(v.dtype), [sink + past, memory.group], dim=-1)
        out = (on_past.flatten(3, 4) @ of_past(v, v)).view_as(queries) + on_own @ values
    return out.permute(0, 3, 1, 4, 2, 5).flatten(1, 3).flatten(2)


def _block(block: TransformerBlock, x: Tensor, memory: _Memory) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + memory.projected).unbind(3)
    y = _modulate(x, shift1, scale1, block.eps).flatten(1, 2)
    out = block.self_attn.o(_self_attend(block.self_attn, y, memory))
    x = torch.addcmul(x, out.view_as(x), gate1)
    attention = block.cross_attn
    q = attention.queries(block.norm3(x).flatten(1, 2))
    out = attention.o(_attend(q, attention.keys(memory.text), attention.values(memory.text), memory.text_mask))
    x = x + out.view_as(x)
    return torch.addcmul(x, block.ffn(_modulate(x, shift2, scale2, block.eps)), gate2)


BlockPass = Callable[[TransformerBlock, Tensor, _Memory], Tensor]
"""Runs one block over all frames of a pass."""


def compiled() -> BlockPass:
    """Return the pass through a block as one compiled function, which all blocks share."""
    function: BlockPass = torch.compile(_block, dynamic=False)
    return function
