"""What a generator has for the memory of sessions, which admission counts beside its places."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from serve.config import ServiceConfig

if TYPE_CHECKING:
    import torch


def session_budget(config: ServiceConfig, free: Callable[[torch.device | str], int] | None = None) -> int | None:
    """Return the bytes that sessions may take in a generator whose engine is loaded and warm.

    What is free on the device now or, if the configuration says how much memory the device has, what the weights leave
    of that; less what a chunk needs while it is made, and what the runtime keeps. Replicas that share a device or a
    machine measure each what the others have left so far; give such replicas ``generator.memory_bytes``.

    Args:
        config: The service's.
        free: Measures the device; tests inject another.

    Returns:
        0 or more; None for a simulated engine, whose sessions take nothing.
    """
    if config.engine == "simulated":
        return None
    from causal_forcing.weights.memory import ACTIVATIONS, RESERVE_BYTES

    engine = config.generator_memory(sessions=0)
    if config.generator.memory_bytes is not None:
        return max(0, config.generator.memory_bytes - engine.total_bytes - RESERVE_BYTES)
    return max(0, (free or _free_bytes)(config.device) - dict(engine.items)[ACTIVATIONS] - RESERVE_BYTES)


def _free_bytes(device: torch.device | str) -> int:
    """Return what is free on a device once the allocator has given back what the warm-up left with it."""
    import torch

    from causal_forcing.weights.memory import free_bytes

    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return free_bytes(device)
