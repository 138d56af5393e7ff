"""A whole session state, copied out to the host: gigabytes at full size, and it continues bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from causal_forcing.cursor import CacheCursor
from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.saved import FORMAT, config_to_json, parsing, read_file, update_from_json, update_to_json
from causal_forcing.state import PromptState, SessionState
from causal_forcing.transformer import TextMemory

if TYPE_CHECKING:
    from causal_forcing.session import Session

_COUNTERS = ("chunk_index", "scene_chunks", "rebuilt_chunk", "cache_is_stale")
"""Host-side values of a :class:`SessionState` that a snapshot copies as they are."""


@dataclass(frozen=True)
class Snapshot:
    """A whole session state, copied out.

    Attributes:
        meta: Host-side values, JSON-able; holds the prompts' texts.
        tensors: Every tensor of the state, by name, on the CPU (a device that holds one session may not hold two).
    """

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @classmethod
    def take(cls, session: Session) -> Snapshot:
        """Return a copy of the session's state.

        Raises:
            SessionStateError: If the session has failed.
        """
        state = session.state
        if state.failed:
            raise SessionStateError(f"the session has failed: {state.failed}", reason="SESSION_FAILED")
        prompt = state.prompt
        meta = {
            "format": FORMAT,
            "preset": session.engine.preset.name,
            "config": config_to_json(session.config),
            "cursor": asdict(state.cache.cursor),
            "counters": {name: getattr(state, name) for name in _COUNTERS},
            "prompt": {
                "update": update_to_json(prompt.update) if prompt.update else None,
                "waiting": update_to_json(prompt.waiting[0]) if prompt.waiting else None,
                "step": prompt.step,
                "chunk": prompt.chunk,
                "announced": prompt.announced,
            },
        }
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in _state_tensors(session).items()}
        meta["shapes"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
        return cls(meta, tensors)

    def apply(self, session: Session) -> None:
        """Replace the session's state; nothing is changed if the snapshot does not fit.

        Raises:
            InvalidRequest: If it is of another model or configuration, or a part is missing, extra or misshapen.
        """
        self._require_fit(session)
        state, layers = session.state, session.engine.transformer.config.num_layers
        with torch.inference_mode(), parsing("snapshot", "its meta data"):
            own = {name: self.tensors[name].to(session.engine.device, copy=True) for name in self._own_names()}
            prompt, text = _prompt_state(self.meta["prompt"], own), _text_memory(own, layers)
            latents = {int(name.removeprefix("latents.")): own[name] for name in own if name.startswith("latents.")}
            cursor = CacheCursor(**self.meta["cursor"])
            counters = {name: self.meta["counters"][name] for name in _COUNTERS}
            self._load_decoder(state)
            for name, target in _cache_tensors(session).items():
                target.copy_(self.tensors[name])
        state.cache.cursor, state.prompt, state.text, state.latents = cursor, prompt, text, latents
        state.failed = None
        for name, value in counters.items():
            setattr(state, name, value)

    def save(self, path: Path) -> None:
        """Write the snapshot as one safetensors file."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"snapshot": json.dumps(self.meta)})

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Return a saved snapshot.

        Raises:
            InvalidRequest: If the file is not a snapshot.
        """
        meta, tensors = read_file(path, "snapshot")
        return cls(meta, tensors)

    def _own_names(self) -> list[str]:
        """Return the tensors that are not buffers the session has already."""
        return [name for name in self.tensors if not name.startswith(("cache.", "decoder."))]

    def _load_decoder(self, state: SessionState) -> None:
        if state.decoder is None:
            return
        saved = {n.removeprefix("decoder."): t for n, t in self.tensors.items() if n.startswith("decoder.")}
        try:
            state.decoder.load_tensors(saved)  # all of it, or none
        except SessionStateError as error:
            raise InvalidRequest("snapshot.tensors", "a decoder state", error.message) from error

    def _require_fit(self, session: Session) -> None:
        """Raise :class:`InvalidRequest` unless model, configuration and the caches' shapes are this session's."""
        meta, caches = self.meta, _cache_tensors(session)
        mine = {"format": FORMAT, "preset": session.engine.preset.name, "config": config_to_json(session.config)}
        for name, value in mine.items():
            if meta.get(name) != value:
                raise InvalidRequest(f"snapshot.{name}", meta.get(name), f"must be {value!r}, as in this session")
        found = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        wrong = _differing(found, meta.get("shapes", {}))
        wrong += _differing(
            {name: (tensor.shape, tensor.dtype) for name, tensor in self.tensors.items() if name.startswith("cache.")},
            {name: (tensor.shape, tensor.dtype) for name, tensor in caches.items()},
        )
        if session.state.decoder is None:
            wrong += [name for name in found if name.startswith("decoder.")]
        if wrong:
            raise InvalidRequest("snapshot.tensors", wrong[:4], "must have exactly this session's parts and shapes")


def _cache_tensors(session: Session) -> dict[str, Tensor]:
    cache = session.state.cache
    parts = {"keys": cache.keys, "values": cache.values, "sink_keys": cache.sink_keys}
    return {f"cache.{part}.{i}": tensor for part, tensors in parts.items() for i, tensor in enumerate(tensors)}


def _state_tensors(session: Session) -> dict[str, Tensor]:
    state = session.state
    named = _cache_tensors(session)
    if state.text is not None:
        named |= {f"text.keys.{i}": t for i, t in enumerate(state.text.keys)}
        named |= {f"text.values.{i}": t for i, t in enumerate(state.text.values)}
    named |= {f"prompt.{name}": t for name, t in state.prompt.tensors().items()}
    named |= {f"latents.{position}": t for position, t in state.latents.items()}
    if state.decoder is not None:
        named |= {f"decoder.{name}": t for name, t in state.decoder.tensors().items()}
    return named


def _text_memory(tensors: dict[str, Tensor], layers: int) -> TextMemory | None:
    if "text.keys.0" not in tensors:
        return None
    keys = tuple(tensors[f"text.keys.{i}"] for i in range(layers))
    return TextMemory(keys, tuple(tensors[f"text.values.{i}"] for i in range(layers)))


def _prompt_state(meta: dict[str, Any], tensors: dict[str, Tensor]) -> PromptState:
    waiting = meta["waiting"]
    return PromptState(
        update=update_from_json(meta["update"]) if meta["update"] else None,
        embeds=tensors.get("prompt.embeds"),
        source=tensors.get("prompt.source"),
        target=tensors.get("prompt.target"),
        step=meta["step"],
        chunk=meta["chunk"],
        announced=meta["announced"],
        waiting=(update_from_json(waiting), tensors["prompt.waiting"]) if waiting else None,
    )


def _differing(found: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    """Return the names that only one has, or that have different values."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
