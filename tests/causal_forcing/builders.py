"""Tiny engines, prompts and streams that tests of the core are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from causal_forcing.config import DEFAULT_SHIFT, TransformerConfig, VaeConfig
from causal_forcing.engine import Engine
from causal_forcing.presets import get_preset
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import WanVae

TRANSFORMER = TransformerConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=12, text_len=5)
STEPS = (1000, 500)
FIRST_STEPS = (1000, 750, 500)
SIZE = {"height": 32, "width": 48}
ENDLESS = {"window_frames": 5, "sink_frames": 2}
"""Evicts from the fourth chunk on, and rotates its sink."""


def make_transformer(config=TRANSFORMER, seed=1):
    """Return a transformer with weights large enough for attention, modulation and text to matter."""
    transformer = CausalTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        centre = 1.0 if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")) else 0.0
        spread = 0.4 if "modulation" in name or "text" in name else 0.15
        with torch.no_grad():
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return transformer.requires_grad_(False)


def make_vae(seed=2, *, num_res_blocks=1):
    torch.manual_seed(seed)
    return WanVae(VaeConfig(base_dim=4, num_res_blocks=num_res_blocks)).requires_grad_(False)


class HashTextEncoder:
    """Embeddings drawn from the prompt's text: equal texts, equal embeddings."""

    def encode(self, texts: Sequence[str]) -> list[PromptEmbedding]:
        return [embedding(text) for text in texts]


def embedding(text, config=TRANSFORMER):
    seed = int.from_bytes(str(text).encode(), "little") % 2**31
    embeds = torch.randn(1, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(seed))
    embeds[:, -1] = 0  # a padding row, like every real prompt has
    return PromptEmbedding(embeds, str(text))


def make_engine(chunk_frames=1, *, vae=False, seed=1, config=TRANSFORMER):
    """Return an engine of a model that exists nowhere else; every call with one seed gives the same weights."""
    preset = replace(
        get_preset("tiny"),
        name=f"test-{chunk_frames}",
        transformer=config,
        chunk_frames=chunk_frames,
        first_chunk_steps=None,
        shift=DEFAULT_SHIFT,
        sink_frames=0,
    )
    return Engine(preset, make_transformer(config, seed), make_vae() if vae else None, HashTextEncoder())


def update(text, **options):
    return PromptUpdate((WeightedPrompt(str(text)),), prompt_id=str(text), **options)


def open_session(engine, prompt="a", *, noise=None, **config):
    """Return a session at 32x48 with short schedules and its first prompt set (None: no prompt)."""
    defaults = {**SIZE, "denoising_steps": STEPS, "first_chunk_steps": FIRST_STEPS, "window_frames": 6}
    session = engine.new_session(engine.session_config(**(defaults | config)), noise=noise)
    if prompt is not None:
        session.update_prompt(update(prompt))
    return session


def play(session, chunks, script: Mapping[int, PromptUpdate] | None = None, record=None):
    """Generate chunks up to index ``chunks - 1``, submitting each update of the script before its chunk."""
    made = []
    for index in range(session.state.chunk_index, chunks):
        if script and index in script:
            session.update_prompt(script[index])
        made.append(session.generate_chunk())
        if record is not None:
            record.append(made[-1], session.state.prompt.update)
    return made


def latents_of(chunks):
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def assert_same_chunks(ours, theirs):
    """Assert that two streams are equal: bit for bit, and in everything that is said about each chunk."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert words_of(a) == words_of(b)
        assert torch.equal(a.latents, b.latents), f"chunk {a.index} differs"


def words_of(chunk):
    return replace(chunk, latents=None, is_finite=None, after_rebuild=False)


def assert_same_state(session, snapshot):
    """Assert that a session is where a snapshot of it was taken, bit for bit."""
    now = session.snapshot()
    assert now.meta == snapshot.meta
    assert now.tensors.keys() == snapshot.tensors.keys()
    for name, tensor in now.tensors.items():
        assert torch.equal(tensor, snapshot.tensors[name]), f"{name} changed"


def given_latents(frames, seed=0):
    shape = (1, 16, frames, SIZE["height"] // 8, SIZE["width"] // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
