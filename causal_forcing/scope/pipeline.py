"""The pipeline: one call is one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from scope.core.pipelines.interface import Pipeline

from causal_forcing.errors import InvalidRequest

from .requests import ChunkRequest, Parameters, RefusedPrompt, Start, chosen_numbers
from .schema import CausalForcingConfig

if TYPE_CHECKING:
    from torch import Tensor


class Backend(Protocol):
    """Where chunks are made."""

    def next_chunk(self, request: ChunkRequest) -> Tensor:
        """Return the next chunk's frames ``[T, H, W, 3]``, float32 in [0, 1]; the stream begins anew if asked to.

        Raises:
            InvalidRequest: If what the call asks for is not allowed; the next call goes on as if it had not been.
            RefusedPrompt: If the prompt of the last switch will not be shown.
        """
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
        chosen_steps = chosen_numbers(config, "denoising_steps").get("denoising_steps", ())
        self.state: dict[str, Any] = {"_transition_active": False}
        self._parameters = Parameters(
            Start(config.base_seed, tuple(chosen_steps)),
            config.switch_policy,
            default_steps=CausalForcingConfig.model_fields["denoising_steps"].default,
        )
        self._transition_chunks_left = 0
        self._backend = _open_backend(config, loras, model_dir, device)

    def prepare(self, **_: object) -> None:
        """Return None: frames are made from text, not from frames."""
        return

    def __call__(self, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401  (Scope's signature)
        """Return the next chunk ``{"video": [T, H, W, C]}``, or ``{}`` as long as there is no prompt.

        Raises:
            InvalidRequest: If a parameter is not allowed; the stream goes on with the next call.
            RefusedPrompt: If a server does not show a prompt; the stream goes on under the one before it.
        """
        request = self._parameters.take(parameters)
        if request is None:
            return {}
        try:
            video = self._backend.next_chunk(request)
        except InvalidRequest:
            self._parameters.take_back()
            raise
        except RefusedPrompt as refused:
            self._parameters.refused(refused.retry_after_s)
            self._count_transition(0)
            raise
        self._count_transition(request.update.transition_chunks if request.update else self._transition_chunks_left)
        return {"video": video}

    def shutdown(self) -> None:
        """Give weights and session, or the connection, back; Scope does not call it (see :mod:`.interface`)."""
        self._backend.close()

    def _count_transition(self, chunks: int) -> None:
        """Note that one more chunk was made when a transition had that many to go."""
        self._transition_chunks_left = max(0, chunks - 1)
        self.state["_transition_active"] = self._transition_chunks_left > 0


def _open_backend(
    config: CausalForcingConfig, loras: Sequence[dict[str, Any]], model_dir: str | Path | None, device: str | None
) -> Backend:
    if config.server:
        from .remote import RemoteBackend

        return RemoteBackend(config, loras, model_dir, device)
    from .in_process import EngineBackend

    return EngineBackend(config, loras, model_dir, device)
