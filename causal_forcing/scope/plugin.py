"""The entry point: tells Scope's plugin manager about the pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pluggy

hookimpl = pluggy.HookimplMarker("scope")


@hookimpl
def register_pipelines(register: Callable[[type], None]) -> None:
    """Register the pipeline; Scope calls this with a callback that takes a pipeline class."""
    from .pipeline import CausalForcingPipeline

    register(CausalForcingPipeline)
