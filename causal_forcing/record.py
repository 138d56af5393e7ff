"""The two kinds of saved session.

A :class:`Snapshot` holds the caches (gigabytes at full size) and continues bit for bit. A :class:`SessionRecord` holds
events and latents (megabytes) and is rebuilt on any engine of the same model:

- ``fast``: keys and values of the frames in the window are recomputed from their latents. Close, not equal: in the
  lost cache, deep layers of the kept frames still carried evicted ones.
- ``exact``: every chunk since the start, or since the last anchor, goes through the context pass again, which repeats
  the original computation and gives the same bits on the same kind of device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from causal_forcing.config import SessionConfig
from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.kv_cache import CacheCursor
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.session import Chunk, Session
from causal_forcing.state import PromptState
from causal_forcing.transformer import TextMemory
from causal_forcing.vae import WanVae

if TYPE_CHECKING:
    from causal_forcing.engine import Engine

FORMAT = 1
"""Version of both file layouts."""


class RestoreMode(StrEnum):
    """How a record becomes a session again."""

    FAST = "fast"
    EXACT = "exact"


@dataclass(frozen=True)
class Snapshot:
    """A whole session state, copied out.

    Attributes:
        meta: Host-side values, JSON-able; holds the prompts' texts.
        tensors: Every tensor of the state, by name.
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
            "chunk_index": state.chunk_index,
            "scene_chunks": state.scene_chunks,
            "anchored_chunk": state.anchored_chunk,
            "latent_positions": sorted(state.latents),
            "prompt": {
                "update": update_to_json(prompt.update) if prompt.update else None,
                "waiting": update_to_json(prompt.waiting[0]) if prompt.waiting else None,
                "step": prompt.step,
                "chunk": prompt.chunk,
                "announced": prompt.announced,
            },
        }
        return cls(meta, {name: tensor.clone() for name, tensor in _state_tensors(session).items()})

    def apply(self, session: Session) -> None:
        """Replace the session's state; nothing is changed if the snapshot does not fit.

        Raises:
            InvalidRequest: If it is of another model or configuration, or a part is missing, extra or misshapen.
        """
        meta, state = self.meta, session.state
        mine = {"format": FORMAT, "preset": session.engine.preset.name, "config": config_to_json(session.config)}
        for name, value in mine.items():
            if meta.get(name) != value:
                raise InvalidRequest(f"snapshot.{name}", meta.get(name), f"must be {value!r}, as in this session")
        self._require_parts(session)
        prompt_meta = meta["prompt"]
        waiting = prompt_meta["waiting"]
        device = session.engine.device
        with torch.inference_mode():
            held = {name: tensor.to(device, copy=True) for name, tensor in self.tensors.items() if "cache." not in name}
            for name, target in _cache_tensors(session).items():
                target.copy_(self.tensors[name])
            if state.decoder is not None:
                decoder = {k.removeprefix("decoder."): t for k, t in self.tensors.items() if k.startswith("decoder.")}
                state.decoder.load_tensors(decoder)
        state.cache.cursor = CacheCursor(**meta["cursor"])
        state.text = _text_memory(held, session.engine.transformer.config.num_layers)
        state.latents = {p: held[f"latents.{p}"] for p in meta["latent_positions"]}
        state.chunk_index, state.scene_chunks = meta["chunk_index"], meta["scene_chunks"]
        state.anchored_chunk, state.failed = meta["anchored_chunk"], None
        state.prompt = PromptState(
            update=update_from_json(prompt_meta["update"]) if prompt_meta["update"] else None,
            embeds=held.get("prompt.embeds"),
            source=held.get("prompt.source"),
            target=held.get("prompt.target"),
            step=prompt_meta["step"],
            chunk=prompt_meta["chunk"],
            announced=prompt_meta["announced"],
            waiting=(update_from_json(waiting), held["prompt.waiting"]) if waiting else None,
        )

    def save(self, path: Path) -> None:
        """Write the snapshot as one safetensors file."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"snapshot": json.dumps(self.meta)})

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Return a saved snapshot.

        Raises:
            InvalidRequest: If the file is not a snapshot.
        """
        meta, tensors = _read_file(path, "snapshot")
        return cls(meta, tensors)

    def _require_parts(self, session: Session) -> None:
        expected = {name: list(tensor.shape) for name, tensor in _cache_tensors(session).items()}
        if session.state.decoder is not None:
            decoder = session.state.decoder.tensors()
            expected |= {f"decoder.{name}": list(tensor.shape) for name, tensor in decoder.items()}
        found = {name: list(t.shape) for name, t in self.tensors.items() if name.startswith(("cache.", "decoder."))}
        if found != expected:
            wrong = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            raise InvalidRequest("snapshot.tensors", wrong[:4], "must have exactly this session's caches and shapes")


@dataclass
class RecordedChunk:
    """One committed chunk as a record keeps it.

    Attributes:
        frames: Its latent frames.
        given: Whether it was given rather than generated.
        update: Prompt update applied at its boundary, or None.
        latents: ``[1, 16, F, h, w]`` on the CPU; None once no restore can need it.
    """

    frames: int
    given: bool
    update: PromptUpdate | None
    latents: Tensor | None


@dataclass
class SessionRecord:
    """What makes a session what it is: the model, the configuration, its events and its latents.

    With ``keep_all`` the record can be restored exactly, and grows by the size of the latents, or stays bounded if the
    configuration has anchors; without, it keeps what a fast restore needs.

    Attributes:
        preset: Name of the model.
        config: The session's.
        keep_all: Whether to keep what an exact restore needs.
        chunks: Every committed chunk, in order.
    """

    preset: str
    config: SessionConfig
    keep_all: bool = True
    chunks: list[RecordedChunk] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept latents."""
        return sum(c.latents.nbytes for c in self.chunks if c.latents is not None)

    def append(self, chunk: Chunk, update: PromptUpdate | None = None, *, given: bool = False) -> None:
        """Record a committed chunk.

        Args:
            chunk: The next one; its latents are copied to the CPU.
            update: The prompt update in force, needed when ``chunk.prompt_applied``.
            given: Whether it came from :meth:`Session.start_from`.

        Raises:
            ValueError: If a chunk was left out, or applies an update that is not given.
        """
        if chunk.index != len(self.chunks):
            raise ValueError(f"chunk {chunk.index} after {len(self.chunks)} chunks")
        if chunk.prompt_applied and update is None:
            raise ValueError("a chunk that applies a prompt must be recorded with its update")
        latents = chunk.latents.to("cpu", copy=True)
        applied = update if chunk.prompt_applied else None
        self.chunks.append(RecordedChunk(latents.shape[2], given, applied, latents))
        self._drop_unneeded()

    @property
    def exact_start(self) -> int:
        """Chunk from which an exact restore replays: the last anchor, or 0."""
        every = self.config.anchor_every_chunks
        return 0 if every is None or not self.chunks else (len(self.chunks) - 1) // every * every

    def restore(
        self,
        engine: Engine,
        mode: RestoreMode = RestoreMode.FAST,
        encode: Callable[[PromptUpdate], Sequence[PromptEmbedding]] | None = None,
    ) -> Session:
        """Return a session that continues after the last recorded chunk.

        Args:
            engine: Of the same preset.
            mode: ``fast`` or ``exact``.
            encode: Embeddings of an update; None asks the engine's text encoder.

        Raises:
            InvalidRequest: If the record is of another model.
            SessionStateError: If latents that the mode needs were not kept.
        """
        if engine.preset.name != self.preset:
            raise InvalidRequest("record.preset", self.preset, f"must be {engine.preset.name!r}, as in this engine")
        encode = encode or engine.encode_prompts
        session = engine.new_session(self.config)
        total = len(self.chunks)
        first = self.exact_start if mode is RestoreMode.EXACT else total
        if first == 0 and any(c.latents is None for c in self.chunks):
            raise SessionStateError("the record did not keep the latents of every chunk", reason="NOT_EXACT")
        if first:
            self._account(session, first, encode)
        for recorded in self.chunks[first:]:
            if recorded.update is not None:
                session.update_prompt(recorded.update, encode(recorded.update))
            assert recorded.latents is not None
            (session.start_from if recorded.given else session.replay_chunk)(recorded.latents)
        if first == total and total:
            session.rebuild_cache()
        self._prime_decoder(session)
        return session

    def save(self, path: Path) -> None:
        """Write the record as one safetensors file."""
        meta = {
            "format": FORMAT,
            "preset": self.preset,
            "config": config_to_json(self.config),
            "keep_all": self.keep_all,
            "chunks": [
                {"frames": c.frames, "given": c.given, "update": update_to_json(c.update) if c.update else None}
                for c in self.chunks
            ],
        }
        kept = {f"latents.{i}": c.latents.contiguous() for i, c in enumerate(self.chunks) if c.latents is not None}
        save_file(kept, path, metadata={"record": json.dumps(meta)})

    @classmethod
    def load(cls, path: Path) -> SessionRecord:
        """Return a saved record.

        Raises:
            InvalidRequest: If the file is not a record.
        """
        meta, tensors = _read_file(path, "record")
        chunks = [
            RecordedChunk(
                c["frames"],
                c["given"],
                update_from_json(c["update"]) if c["update"] else None,
                tensors.get(f"latents.{i}"),
            )
            for i, c in enumerate(meta["chunks"])
        ]
        return cls(meta["preset"], config_from_json(meta["config"]), meta["keep_all"], chunks)

    def _account(
        self, session: Session, upto: int, encode: Callable[[PromptUpdate], Sequence[PromptEmbedding]]
    ) -> None:
        """Bring everything but the caches to where it was before chunk ``upto``."""
        state, geometry = session.state, session.config.geometry
        with torch.inference_mode():
            for index, recorded in enumerate(self.chunks[:upto]):
                if recorded.update is not None:
                    session.update_prompt(recorded.update, encode(recorded.update))
                change = state.prompt.begin_chunk(index)
                if change is not None:
                    state.forget(change)
                state.cache.skip(recorded.frames)
                shape = geometry.latent_shape(recorded.frames)
                latents = torch.zeros(shape) if recorded.latents is None else recorded.latents
                state.remember(latents.to(session.engine.device, session.engine.dtype))
                state.prompt.announced = True
                state.chunk_index += 1
                state.scene_chunks += not recorded.given
            assert state.prompt.embeds is not None
            state.text = session.engine.transformer.read_text(state.prompt.embeds)

    def _prime_decoder(self, session: Session) -> None:
        """Bring the decoder's caches to the end of the stream from the newest latents of the scene."""
        decoder, vae = session.state.decoder, session.engine.vae
        if decoder is None or vae is None:
            return
        wanted = min(vae.REACH, session.state.position - session.state.cache.cursor.origin)
        newest: list[Tensor] = []
        for recorded in reversed(self.chunks):
            if sum(t.shape[2] for t in newest) >= wanted or recorded.latents is None:
                break
            newest.insert(0, recorded.latents)
        if wanted:
            latents = torch.cat(newest, dim=2)[:, :, -wanted:]
            with torch.inference_mode():
                vae.decode(latents.to(session.engine.device, session.engine.dtype), decoder)

    def _drop_unneeded(self) -> None:
        """Let go of latents that no restore from now on can need."""
        if self.keep_all and self.config.anchor_every_chunks is None:
            return
        base = self.exact_start if self.keep_all else len(self.chunks)
        starts, position = [], 0
        for chunk in self.chunks:
            starts.append(position)
            position += chunk.frames
        base_frame = starts[base] if base < len(starts) else position
        needed_from = base_frame - max(self.config.cache_frames, WanVae.REACH)
        scene = max((i for i, c in enumerate(self.chunks[: base + 1]) if _cuts_scene(c)), default=0)
        sink_end = starts[scene] + self.config.sink_frames
        for chunk, start in zip(self.chunks, starts, strict=True):
            in_sink = starts[scene] <= start < sink_end
            if start + chunk.frames <= needed_from and not in_sink:
                chunk.latents = None


def config_to_json(config: SessionConfig) -> dict[str, Any]:
    """Return a session configuration as JSON values."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def config_from_json(values: dict[str, Any]) -> SessionConfig:
    """Return the configuration that :func:`config_to_json` wrote."""
    restored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return SessionConfig(**restored)


def update_to_json(update: PromptUpdate) -> dict[str, Any]:
    """Return a prompt update as JSON values."""
    return asdict(update)


def update_from_json(values: dict[str, Any]) -> PromptUpdate:
    """Return the update that :func:`update_to_json` wrote."""
    return PromptUpdate(**(values | {"prompts": tuple(WeightedPrompt(**p) for p in values["prompts"])}))


def _cuts_scene(chunk: RecordedChunk) -> bool:
    return chunk.update is not None and chunk.update.policy == "scene_cut"


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


def _read_file(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})[kind])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InvalidRequest(kind, str(path), f"must be a {kind} file of this program") from error
    if meta.get("format") != FORMAT:
        raise InvalidRequest(f"{kind}.format", meta.get("format"), f"must be {FORMAT}")
    return meta, tensors
