"""What a chunk costs in floating-point operations, from the model's shapes alone."""

from __future__ import annotations

from functools import lru_cache

from causal_forcing.config import SessionConfig, TinyVaeConfig, TransformerConfig, VaeConfig
from causal_forcing.geometry import LATENT_CHANNELS, PATCH, Geometry


def pass_flops(sizes: TransformerConfig, new_tokens: int, seen_tokens: int) -> int:
    """Return the operations of one denoising pass, two a multiply-add.

    Args:
        sizes: Of the transformer.
        new_tokens: Tokens of the chunk.
        seen_tokens: Tokens that they attend to, their own included.
    """
    linear = 2 * new_tokens * (6 * sizes.dim**2 + 2 * sizes.dim * sizes.ffn_dim)
    attention = 4 * new_tokens * sizes.dim * (seen_tokens + sizes.text_len)
    ends = 2 * 2 * new_tokens * PATCH * PATCH * LATENT_CHANNELS * sizes.dim
    return sizes.num_layers * (linear + attention) + ends


def chunk_flops(sizes: TransformerConfig, config: SessionConfig, chunk_frames: int) -> int:
    """Return the operations of a chunk on a full window: its denoising steps and the context pass."""
    tokens = config.geometry.tokens_per_frame
    one_pass = pass_flops(sizes, chunk_frames * tokens, config.cache_frames * tokens)
    return (len(config.denoising_steps) + 1) * one_pass


@lru_cache(maxsize=64)
def decode_flops(sizes: VaeConfig | TinyVaeConfig, height: int, width: int) -> int:
    """Return the operations of decoding a latent frame that is not a scene's first, counted on the meta device.

    Args:
        sizes: Of the VAE.
        height: Pixel rows.
        width: Pixel columns.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from causal_forcing.weights.loading import build_vae

    geometry, (vae, _) = Geometry(height, width), build_vae(sizes)
    state = vae.new_decoder_state(geometry, device=torch.device("meta"), dtype=torch.float32)
    latents = torch.zeros(geometry.latent_shape(1), device="meta")
    with torch.inference_mode():
        vae.decode(latents, state)
        with FlopCounterMode(display=False) as counter:
            vae.decode(latents, state)
    return int(counter.get_total_flops())
