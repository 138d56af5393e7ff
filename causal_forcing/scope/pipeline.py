"""The pipeline: one call is one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from scope.core.pipelines.interface import Pipeline

from .requests import ChunkRequest, Parameters, Start
from .schema import CausalForcingConfig

if TYPE_CHECKING:
    from torch import Tensor


class Backend(Protocol):
    """Where chunks are made."""

    def next_chunk(self, request: ChunkRequest) -> Tensor:
        """Return the next chunk's frames ``[T, H, W, 3]``, float32 in [0, 1]; the stream begins anew if asked to."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class CausalForcingPipeline(Pipeline):  # type: ignore[misc]  # Scope is not installed where types are checked
    """Causal Forcing in Scope.

    Args:
        loras: LoRAs to merge at load, ``{"path": ..., "scale": 1.0}`` each.
        model_dir: Folder of weights; None for the one that `causal-forcing download` fills.
        device: Where to run; None takes a GPU if there is one.
        parameters: The fields of :class:`CausalForcingConfig`.

    Attributes:
        state: What Scope's processor asks for: ``_transition_active``.
    """

    @classmethod
    def get_config_class(cls) -> type[CausalForcingConfig]:
        """Return the class of the parameters."""
        return CausalForcingConfig

    def __init__(
        self,
        *,
        loras: Sequence[dict[str, Any]] = (),
        model_dir: str | Path | None = None,
        device: str | None = None,
        **parameters: Any,  # noqa: ANN401  (checked by the schema)
    ) -> None:
        known = {name: value for name, value in parameters.items() if name in CausalForcingConfig.model_fields}
        config = CausalForcingConfig(**known)  # others are Scope's own, such as its merge mode
        start = Start(config.base_seed, tuple(config.denoising_steps))
        self.state: dict[str, Any] = {"_transition_active": False}
        self._parameters = Parameters(start, config.switch_policy)
        self._transition_chunks_left = 0
        self._backend = _open_backend(config, loras, model_dir, device)

    def prepare(self, **_: object) -> None:
        """Return None: frames are made from text, not from frames."""
        return

    def __call__(self, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401  (Scope's signature)
        """Return the next chunk ``{"video": [T, H, W, C]}``, or ``{}`` as long as there is no prompt.

        Raises:
            InvalidRequest: If a parameter is not allowed; the stream goes on with the next call.
        """
        request = self._parameters.take(parameters)
        if request is None:
            return {}
        if request.update is not None:
            self._transition_chunks_left = request.update.transition_chunks
        video = self._backend.next_chunk(request)
        self._transition_chunks_left = max(0, self._transition_chunks_left - 1)
        self.state["_transition_active"] = self._transition_chunks_left > 0
        return {"video": video}

    def shutdown(self) -> None:
        """Give weights and session, or the connection, back."""
        self._backend.close()


def _open_backend(
    config: CausalForcingConfig, loras: Sequence[dict[str, Any]], model_dir: str | Path | None, device: str | None
) -> Backend:
    if config.server:
        from .remote import RemoteBackend

        return RemoteBackend(config, loras, model_dir, device)
    from .in_process import EngineBackend

    return EngineBackend(config, loras, model_dir, device)
