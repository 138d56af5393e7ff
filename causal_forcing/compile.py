"""``torch.compile`` of a chunk's two passes behind one switch, with a warm-up that leaves nothing to compile.

Each pass becomes one graph without breaks, in three versions: the first chunk (*filling*), any number of visible rows
(*dynamic*), and a full window, where every shape is static (*full*). The cache is written in place by row numbers,
which are a tensor, so nothing depends on where in the ring a chunk lands, and a stream whose window is full never
compiles again. Positions reach the graphs as rotations, so they run forever.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from causal_forcing.config import SessionConfig
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.transformer import CausalTransformer

if TYPE_CHECKING:
    from causal_forcing.engine import Engine

GRAPHS_PER_SIZE = 3
"""Versions of one pass at one frame size: filling, dynamic, full."""

_PASSES = ("forward", "write_context")
_MAX_GRAPHS = 64
"""Versions of a pass that may exist at a time; a session of a new frame size adds a few. (torch's default is 8.)"""


def compile_transformer(transformer: CausalTransformer, *, backend: str = "inductor") -> None:
    """Replace the passes of a transformer by compiled ones that do the same; compiling begins at their first call.

    The weights stay inputs of the graphs: folding them in (``freezing``) copied them into each graph and was no faster.

    Args:
        transformer: Loaded, quantised and packed.
        backend: Of ``torch.compile``.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for name in _PASSES:
        setattr(transformer, name, torch.compile(getattr(transformer, name), fullgraph=True, backend=backend))


def warm_up(engine: Engine, config: SessionConfig | None = None) -> None:
    """Compile everything that a session of this configuration will run: fill a session's window, and one chunk more.

    Args:
        engine: With a compiled transformer.
        config: What the session will ask for; None takes the preset's defaults.
    """
    session = engine.new_session(config)
    shape = (1, engine.transformer.config.text_len, engine.transformer.config.text_dim)
    prompt = PromptUpdate((WeightedPrompt("warm up"),))
    session.update_prompt(prompt, [PromptEmbedding(torch.zeros(shape, device=engine.device), "warm up")])
    cache, frames = session.state.cache, engine.preset.chunk_frames
    for _ in range(math.ceil(session.config.cache_frames / frames) + 1):
        if cache.has_room(frames):
            session.generate_chunk()
