"""A session's events and latents: megabytes, from which any engine of the same model continues it.

A :class:`~causal_forcing.snapshot.Snapshot` holds the caches themselves; a :class:`SessionRecord` has them recomputed:

- ``fast``: keys and values of the frames in the window are recomputed from their latents. Close, not equal: in the
  lost cache, deep layers of the kept frames still carried evicted ones.
- ``exact``: every chunk since the start, or since the last anchor, goes through the context pass again, which repeats
  the original computation and gives the same bits on the same kind of device.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from causal_forcing.config import SessionConfig
from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, SwitchPolicy
from causal_forcing.saved import (
    FORMAT,
    config_from_json,
    config_to_json,
    parsing,
    read_file,
    update_from_json,
    update_to_json,
)
from causal_forcing.session import Chunk, Session
from causal_forcing.vae import WanVae

if TYPE_CHECKING:
    from causal_forcing.engine import Engine


class RestoreMode(StrEnum):
    """How a record becomes a session again."""

    FAST = "fast"
    EXACT = "exact"


@dataclass
class RecordedChunk:
    """One committed chunk as a record keeps it.

    Attributes:
        frames: Its latent frames.
        given: Whether it was given rather than generated.
        update: Prompt update applied at its boundary, or None.
        latents: ``[1, 16, F, h, w]`` on the CPU; None once no restore can need it.
        after_rebuild: Whether the cache was rebuilt right before it (the session went on after a fast restore).
    """

    frames: int
    given: bool
    update: PromptUpdate | None
    latents: Tensor | None
    after_rebuild: bool = False


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

    def __post_init__(self) -> None:
        """Index the chunks by frame, so that appending one takes the same time however long the stream is."""
        self._starts = [0]
        self._scenes = [0]
        self._kept: list[int] = []
        self._last_rebuild = 0
        for index in range(len(self.chunks)):
            self._index(index)

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
        self.chunks.append(RecordedChunk(latents.shape[2], given, applied, latents, chunk.after_rebuild))
        self._index(chunk.index)
        self._drop_unneeded()

    @property
    def exact_start(self) -> int:
        """Chunk from which an exact restore replays: the last whose cache was made from kept latents, or 0."""
        every = self.config.anchor_every_chunks
        anchor = 0 if every is None or not self.chunks else (len(self.chunks) - 1) // every * every
        return max(anchor, self._last_rebuild)

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
        if any(c.latents is None for c in self.chunks[first:]):
            raise SessionStateError("the record did not keep every chunk's latents for exactness", reason="NOT_EXACT")
        if first:
            self._account(session, first, encode)
        for recorded in self.chunks[first:]:
            if recorded.update is not None:
                session.update_prompt(recorded.update, encode(recorded.update))
            if recorded.after_rebuild:
                session.rebuild_cache()
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
                {
                    "frames": c.frames,
                    "given": c.given,
                    "update": update_to_json(c.update) if c.update else None,
                    "after_rebuild": c.after_rebuild,
                }
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
        meta, tensors = read_file(path, "record")
        with parsing("record", path):
            chunks = [
                RecordedChunk(
                    c["frames"],
                    c["given"],
                    update_from_json(c["update"]) if c["update"] else None,
                    tensors.get(f"latents.{i}"),
                    c["after_rebuild"],
                )
                for i, c in enumerate(meta["chunks"])
            ]
            return cls(meta["preset"], config_from_json(meta["config"]), meta["keep_all"], chunks)

    def _account(
        self, session: Session, upto: int, encode: Callable[[PromptUpdate], Sequence[PromptEmbedding]]
    ) -> None:
        """Bring everything but the caches to where it was before chunk ``upto``."""
        state, engine = session.state, session.engine
        with torch.inference_mode():
            for index, recorded in enumerate(self.chunks[:upto]):
                if recorded.update is not None:
                    session.update_prompt(recorded.update, encode(recorded.update))
                change = state.prompt.begin_chunk(index)
                if change is not None:
                    state.forget(change)
                state.cache.skip(recorded.frames)
                if recorded.latents is not None:
                    state.remember(recorded.latents.to(engine.device, engine.dtype), engine.preset.chunk_frames)
                state.prompt.announced = True
                state.chunk_index += 1
                state.scene_chunks += not recorded.given
            assert state.prompt.embeds is not None
            state.text = engine.transformer.read_text(state.prompt.embeds)

    def _prime_decoder(self, session: Session) -> None:
        """Bring the decoder's caches to the end of the stream, from the newest latents of the scene, chunk by chunk."""
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
                for part in torch.split(latents, session.engine.preset.chunk_frames, dim=2):
                    vae.decode(part.to(session.engine.device, session.engine.dtype), decoder)

    def _index(self, index: int) -> None:
        chunk = self.chunks[index]
        self._starts.append(self._starts[-1] + chunk.frames)
        if chunk.update is not None and chunk.update.policy is SwitchPolicy.SCENE_CUT:
            self._scenes.append(index)
        if chunk.latents is not None:
            self._kept.append(index)
        if chunk.after_rebuild:
            self._last_rebuild = index

    def _drop_unneeded(self) -> None:
        """Let go of latents that no restore from now on can need."""
        if self.keep_all and self.config.anchor_every_chunks is None:
            return
        base = self.exact_start if self.keep_all else len(self.chunks)
        scene = self._scenes[bisect_right(self._scenes, base) - 1]
        sink = range(self._starts[scene], self._starts[scene] + self.config.sink_frames)
        cached_from = self._starts[base] - self.config.cache_frames
        needed_from = min(cached_from, self._starts[-1] - WanVae.REACH)
        dropped = [i for i in self._kept if self._starts[i + 1] <= needed_from and self._starts[i] not in sink]
        for index in dropped:
            self.chunks[index].latents = None
        self._kept = [i for i in self._kept if self.chunks[i].latents is not None]
