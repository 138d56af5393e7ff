"""``torch.compile`` of a chunk's two passes behind one switch, with a warm-up that leaves nothing to compile.

Each pass becomes one graph without breaks, in three versions: the first chunk (*filling*), any number of visible rows
(*dynamic*), and a full window, where every shape is static (*full*). The cache is written in place by row numbers,
which are a tensor, so nothing depends on where in the ring a chunk lands, and a stream whose window is full never
compiles again. Positions reach the graphs as rotations, so they run forever.

On a GPU the unit is one block instead of a whole pass: all blocks have the same code and the same shapes, so that one
graph serves every one of them, and the time to compile does not grow with the number of layers.

What was compiled is kept on disk (:func:`use_compile_cache`), and the next process of the same program, torch and
device takes it from there.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from causal_forcing.config import SessionConfig
from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.transformer import CausalTransformer

if TYPE_CHECKING:
    from causal_forcing.engine import Engine

GRAPHS_PER_SIZE = 3
"""Versions of one pass at one frame size: filling, dynamic, full."""

COMPILE_CACHE_VARIABLE = "CAUSAL_FORCING_COMPILE_CACHE"
"""Environment variable that names the folder of compiled code."""

_TORCH_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_PASSES = ("forward", "write_context")
_BLOCK_PASSES = ("forward", "remember")
_MAX_GRAPHS = 64
"""Versions of a pass that may exist at a time; a session of a new frame size adds a few. (torch's default is 8.)"""


def compile_cache_dir() -> Path:
    """Return where compiled code is kept: the variable's folder, or ``causal-forcing/compiled`` in the user's cache."""
    chosen = os.environ.get(COMPILE_CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "causal-forcing" / "compiled"


def use_compile_cache(folder: Path | None = None) -> Path:
    """Keep compiled code in a folder from now on, and take it from there; return the folder.

    A folder that was chosen by torch's own variable stays. Entries are keyed by code, shapes, torch and device, so one
    folder may serve different models and machines.

    Args:
        folder: None takes :func:`compile_cache_dir`.
    """
    chosen = folder or os.environ.get(_TORCH_CACHE_VARIABLE) or compile_cache_dir()
    path = Path(chosen)
    path.mkdir(parents=True, exist_ok=True)
    os.environ[_TORCH_CACHE_VARIABLE] = str(path)
    return path


def require_compiler(device: torch.device | str) -> None:
    """Refuse to compile where generated code could not be built; called before any weights are loaded.

    Raises:
        InvalidRequest: If there is no C++ compiler for the CPU, or no Triton and C compiler for a GPU (field
            ``compile``).
    """
    if torch.device(device).type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise InvalidRequest("compile", True, "needs Triton on a GPU: pip install triton")
        chosen = os.environ.get("CC")
        if not any(shutil.which(name) for name in ([chosen] if chosen else ["gcc", "clang"])):
            raise InvalidRequest("compile", True, "needs a C compiler for Triton, e.g. gcc, or its path in CC")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds to import, and only compiling needs it
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InvalidRequest("compile", True, "needs a C++ compiler on a CPU, e.g. g++, or its path in CXX") from None


def compile_transformer(
    transformer: CausalTransformer, *, backend: str = "inductor", by_block: bool | None = None
) -> None:
    """Replace the passes of a transformer by compiled ones that do the same; compiling begins at their first call.

    The weights stay inputs of the graphs: folding them in (``freezing``) copied them into each graph and was no faster.

    Args:
        transformer: Loaded, quantised and laid out.
        backend: Of ``torch.compile``.
        by_block: Whether to compile a block, which all blocks then share, instead of whole passes; None means on a GPU.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    by_block = transformer.device.type == "cuda" if by_block is None else by_block
    owners, names = (transformer.layers, _BLOCK_PASSES) if by_block else ([transformer], _PASSES)
    for owner in owners:
        for name in names:
            setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True, backend=backend))


def warm_up(
    engine: Engine, config: SessionConfig | None = None, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Compile everything that a session of this configuration will run: fill a session's window, and one chunk more.

    Args:
        engine: With a compiled transformer.
        config: What the session will ask for; None takes the preset's defaults.
        progress: Called after every chunk with how many are made, and how many there will be.
    """
    session = engine.new_session(config)
    shape = (1, engine.transformer.config.text_len, engine.transformer.config.text_dim)
    prompt = PromptUpdate((WeightedPrompt("warm up"),))
    session.update_prompt(prompt, [PromptEmbedding(torch.zeros(shape, device=engine.device), "warm up")])
    cache, frames = session.state.cache, engine.preset.chunk_frames
    chunks = math.ceil(session.config.cache_frames / frames) + 1
    for made in range(1, chunks + 1):
        if cache.has_room(frames):
            session.generate_chunk()
        if progress is not None:
            progress(made, chunks)
