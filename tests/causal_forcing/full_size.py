"""Sessions of the real models at 480x832 on the meta device: real dimensions, no data."""

from dataclasses import replace

import torch

from causal_forcing.cursor import CacheCursor
from causal_forcing.engine import Engine
from causal_forcing.presets import get_preset
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import WanVae
from tests.counting import META

FRAMEWISE, CHUNKWISE = "causal-forcing-framewise", "causal-forcing-chunkwise"


def open_full_size_session(name=FRAMEWISE, *, layers=None, held_frames=22, vae=False, **options):
    """Return a bfloat16 session in mid-stream: its prompt is read, many frames were made, the first ones evicted."""
    preset = get_preset(name)
    config = replace(preset.transformer, num_layers=layers or preset.transformer.num_layers)
    with META:
        transformer = CausalTransformer(config).to(torch.bfloat16)
        decoder = WanVae(preset.vaes["wan"]).to(torch.bfloat16) if vae else None
    engine = Engine(replace(preset, transformer=config), transformer.requires_grad_(False), decoder)
    session = engine.new_session(engine.session_config(**options))
    submit_prompt(session)
    session.generate_chunk()
    session.state.cache.cursor = CacheCursor(ring_start=session.config.sink_frames, end=held_frames)
    return session


def submit_prompt(session, *, device="cpu", **options):
    config = session.engine.transformer.config
    embedding = PromptEmbedding(torch.randn(1, config.text_len, config.text_dim, device=device), "key")
    session.update_prompt(PromptUpdate((WeightedPrompt("a red fox"),), **options), [embedding])
