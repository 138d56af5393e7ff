"""The transformer's forward pass for training: many frames, each at its own timestep, under a block-causal mask.

One pass sees ``[clean frames | noisy frames of draw 1 | of draw 2 | ...]``. A clean frame attends to the clean frames up to
itself; a noisy frame attends to the clean frames before it and to itself. All draws share the clean context, so a draw
costs less than a clip. It computes with the modules of :class:`~causal_forcing.transformer.CausalTransformer`, and a test
holds every output equal to the cached inference path.

Shapes: latents ``[B, 16, F, h, w]``, tokens ``[B, L, D]``, heads ``[B, H, L, D]``; ``S = (1 + draws) * F`` frames a pass.

Source: Causal Forcing (arXiv 2602.02214), section on teacher forcing; the mask is that of CausVid and Self-Forcing's
``_prepare_teacher_forcing_mask``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_forcing.rope import RotaryEmbedding, Rotation, rotate
from causal_forcing.transformer import CausalTransformer, TransformerBlock, unpatchify


@dataclass(frozen=True)
class Layout:
    """Who attends to whom in one pass.

    Attributes:
        frames: Latent frames of a clip.
        draws: Noisy copies of every frame; 0 for a pass over clean frames alone.
        window: Frames an attention sees, the frame itself included; None for all.
        chunk: Frames generated together; they attend to each other both ways.
        bidirectional: Whether noisy frames attend to all noisy frames of their draw and to no clean ones.
    """

    frames: int
    draws: int
    window: int | None = None
    chunk: int = 1
    bidirectional: bool = False

    def frame_mask(self) -> Tensor:
        """Return ``[S, S]`` bool, True where the row's frame attends to the column's."""
        index = torch.arange(self.frames)
        row, column = index[:, None] // self.chunk, index[None, :] // self.chunk
        same, past = row == column, row > column
        if self.window is not None:
            newest = (index // self.chunk + 1) * self.chunk
            past = past & (newest[:, None] - index[None, :] <= self.window)
        if self.bidirectional:
            past, same = torch.zeros_like(past), torch.ones_like(same)
        total = (1 + self.draws) * self.frames
        mask = torch.zeros(total, total, dtype=torch.bool)
        mask[: self.frames, : self.frames] = past | same
        for draw in range(1, 1 + self.draws):
            own = slice(draw * self.frames, (draw + 1) * self.frames)
            mask[own, : self.frames] = past
            mask[own, own] = same
        return mask


def predict(
    model: CausalTransformer,
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    embeds: Tensor,
    prompt_of_frame: Tensor,
    layout: Layout,
    rotary: RotaryEmbedding,
) -> Tensor:
    """Return the velocity of every noisy frame.

    Args:
        model: Its modules are used as they are; gradients flow.
        clean: ``[B, 16, F, h, w]`` normalised latents: the context, at timestep 0.
        noisy: ``[B, 16, draws * F, h, w]``, draw by draw.
        timesteps: ``[B, draws * F]`` in (0, 1000].
        embeds: ``[B, P, text_len, text_dim]``: the prompts of each clip.
        prompt_of_frame: ``[B, F]`` int64: which prompt each frame was made under.
        layout: Of this pass.
        rotary: For this frame size.
    """
    latents = torch.cat([clean, noisy], dim=2)
    batch, _, total, height, width = latents.shape
    tokens = (height // 2) * (width // 2)
    context_time = torch.zeros(batch, clean.shape[2], dtype=timesteps.dtype)
    embedded, projected = model.embed_time(torch.cat([context_time, timesteps], dim=1).flatten())
    rotation = repeat_rotation(rotary, layout)
    mask = layout.frame_mask().repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    text = model.text_embedding(embeds.flatten(0, 1)).unflatten(0, embeds.shape[:2])
    groups = _prompt_groups(prompt_of_frame, 1 + layout.draws, embeds.shape[1])
    projected = projected.view(batch, total, 6, -1)
    x = model.embed_patches(latents)
    for block in model.layers:
        x = _block(block, x, projected, rotation, mask, text, groups, tokens)
    head = model.head.modulation + embedded.view(batch, total, 1, -1)
    shift, scale = head.repeat_interleave(tokens, 1).unbind(2)
    x = model.head.head(_modulate(x, shift, scale, model.head.eps))
    velocity = unpatchify(x, latents.shape)
    return velocity[:, :, layout.frames :]


def repeat_rotation(rotary: RotaryEmbedding, layout: Layout) -> Rotation:
    """Return the rotation of a pass: the clip's positions once for the context and once for each draw."""
    return rotary.rotation([*range(layout.frames)] * (1 + layout.draws))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def _block(
    block: TransformerBlock,
    x: Tensor,
    projected: Tensor,
    rotation: Rotation,
    mask: Tensor,
    text: Tensor,
    groups: list[list[Tensor]],
    tokens: int,
) -> Tensor:
    modulation = (block.modulation + projected).repeat_interleave(tokens, 1)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)
    y = _modulate(x, shift1, scale1, block.eps)
    attention = block.self_attn
    q = rotate(attention.queries(y), rotation).transpose(1, 2)
    k = rotate(attention.keys(y), rotation).transpose(1, 2)
    v = attention.values(y).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
    x = torch.addcmul(x, attention.o(out), gate1)
    x = x + _read_prompts(block, block.norm3(x), text, groups, tokens)
    return torch.addcmul(x, block.ffn(_modulate(x, shift2, scale2, block.eps)), gate2)


def _read_prompts(block: TransformerBlock, y: Tensor, text: Tensor, groups: list[list[Tensor]], tokens: int) -> Tensor:
    """Return the cross-attention output, each frame reading the prompt it was made under."""
    attention = block.cross_attn
    rows = []
    for clip, prompts in enumerate(groups):
        frames = y[clip].unflatten(0, (-1, tokens))
        out = torch.zeros_like(frames)
        for prompt, chosen in enumerate(prompts):
            if len(chosen):
                context = text[clip, prompt][None]
                q = attention.queries(frames[chosen].flatten(0, 1)[None]).transpose(1, 2)
                k, v = attention.keys(context).transpose(1, 2), attention.values(context).transpose(1, 2)
                out = out.index_copy(0, chosen, attention.attend(q, k, v)[0].unflatten(0, (-1, tokens)))
        rows.append(out.flatten(0, 1))
    return torch.stack(rows)


def _prompt_groups(prompt_of_frame: Tensor, copies: int, prompts: int) -> list[list[Tensor]]:
    """Return, per clip and prompt, the indices of the pass's frames that read it."""
    repeated = prompt_of_frame.repeat(1, copies)
    return [[(row == prompt).nonzero()[:, 0] for prompt in range(prompts)] for row in repeated]
