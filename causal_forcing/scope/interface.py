"""What the plugin needs of Daydream Scope, as types. Read from daydreamlive/scope@68b0f95.

- ``scope.core.pipelines.interface.Pipeline`` is the base class; :class:`ScopePipeline` says what is called.
- ``scope.core.pipelines.base_schema`` has ``BasePipelineConfig`` (pydantic, unknown keys refused), ``ModeDefaults`` and
  ``ui_field_config``, from which the settings panel is drawn.
- The pluggy project ``scope`` has the hook ``register_pipelines(register)``.

Scope's plugin loader (``server/pipeline_manager.py``) calls ``PipelineClass(**parameters)`` with every default of the
configuration that is not None and what the user chose. Its processor (``server/pipeline_processor.py``) then calls the
pipeline again and again from one thread, with all runtime parameters each time; ``init_cache`` is True for the first
call and after a reset, and is not repeated after an error, nor is a picture that came with it.
``state.get("_transition_active")`` tells it when to stop sending a transition. Nothing is called when a stream pauses
or stops, nor when the pipeline is unloaded: Scope lets go of it then, and what it holds has to end with that.
"""

from __future__ import annotations

from typing import Any, Protocol

SCOPE_COMMIT = "68b0f9564c47d0e0bd380d2833defb76b17fc96d"
"""The version of Scope that this was read from."""


class ScopePipeline(Protocol):
    """What Scope calls on a pipeline."""

    state: dict[str, Any]

    @classmethod
    def get_config_class(cls) -> type | None:
        """Return the pydantic class of the parameters."""
        ...

    def prepare(self, **parameters: object) -> object | None:
        """Return how many input frames the next call needs; None where there is no input."""
        ...

    def __call__(self, **parameters: object) -> dict[str, Any]:
        """Return ``{"video": frames}``, ``[T, H, W, C]`` float in [0, 1], or ``{}`` when there is nothing yet."""
        ...
