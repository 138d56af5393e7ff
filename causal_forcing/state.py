"""All that belongs to one user, as one value: reset, measured, copied out and copied in as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from causal_forcing.blending import blend, interpolate, is_negligible
from causal_forcing.cursor import CacheCursor
from causal_forcing.errors import SessionStateError
from causal_forcing.kv_cache import KeyValueCache
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, SwitchPolicy
from causal_forcing.transformer import TextMemory

if TYPE_CHECKING:
    from causal_forcing.vae import DecoderState


FLUSH_KEEP_FRAMES = 2
"""Latent frames that survive a flush beside the sink. Source: Infinity-RoPE (63d7b84)."""


def split_passes(latents: Tensor, pass_frames: int) -> list[Tensor]:
    """Return latents ``[1, 16, F, h, w]`` in the pieces that one context pass each writes; the last may be shorter."""
    return [latents[:, :, first : first + pass_frames] for first in range(0, latents.shape[2], pass_frames)]


@dataclass(frozen=True)
class PromptChange:
    """A new embedding at a chunk boundary, and what it means for the remembered frames.

    Attributes:
        policy: What to do with remembered frames.
        is_first: Whether the update begins here (rather than its transition going on).
    """

    policy: SwitchPolicy
    is_first: bool


@dataclass
class PromptState:
    """The prompt in force, the one waiting, and the transition between two.

    Attributes:
        update: In force; None before the first.
        embeds: Embedding of the next chunk, ``[1, text_len, text_dim]``.
        source: Embedding that a running transition left from; None outside one.
        target: Embedding that it leads to.
        step: Chunks of the transition begun so far.
        chunk: Chunk whose boundary was handled last. A chunk's boundary happens once, however often the chunk is tried;
            an update that arrives between two tries waits for the next boundary.
        announced: Whether a chunk made under ``update`` was committed.
        waiting: The next update and its blended embedding; a later one replaces it.
    """

    update: PromptUpdate | None = None
    embeds: Tensor | None = None
    source: Tensor | None = None
    target: Tensor | None = None
    step: int = 0
    chunk: int = -1
    announced: bool = False
    waiting: tuple[PromptUpdate, Tensor] | None = None

    def submit(self, update: PromptUpdate, embeddings: list[PromptEmbedding]) -> None:
        """Let an update wait for the next chunk boundary.

        Whether its transition would show anything is decided here, because that waits for the device that holds the
        embeddings; no chunk does.

        Args:
            update: Its prompts' weights and blend are applied here.
            embeddings: One per prompt. The embedding in force moves to their device.
        """
        mixed = blend([e.embeds for e in embeddings], [p.weight for p in update.prompts], update.blend)
        source = self.embeds
        if source is not None and update.transition_chunks > 1:
            source = source.to(mixed.device)
            if is_negligible(source, mixed):
                update = replace(update, transition_chunks=0)
        self.embeds, self.waiting = source, (update, mixed)

    def begin_chunk(self, chunk: int, *, full: bool = False) -> PromptChange | None:
        """Return what changes at this chunk's boundary, or None.

        Args:
            chunk: Index of the chunk.
            full: Whether the chunk cannot be made for lack of room. Its next boundary would never come, so a waiting
                update (which may make room) is taken even if the boundary was handled before.

        Raises:
            SessionStateError: If there is no prompt at all (reason ``NO_PROMPT``).
        """
        if self.embeds is None and self.waiting is None:
            raise SessionStateError("the session has no prompt yet", reason="NO_PROMPT")
        if self.chunk == chunk and not (full and self.waiting is not None):
            return None
        change: PromptChange | None = None
        if self.waiting is not None:
            change = self._switch(*self.waiting)
        elif self.target is not None:
            change = self._step()
        self.chunk, self.waiting = chunk, None
        return change

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors it holds, by name."""
        named = {"embeds": self.embeds, "source": self.source, "target": self.target}
        if self.waiting is not None:
            named["waiting"] = self.waiting[1]
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _switch(self, update: PromptUpdate, target: Tensor) -> PromptChange:
        source: Tensor | None = self.embeds
        if source is None or update.transition_chunks <= 1:
            source, embeds = None, target
        else:
            embeds = interpolate(source, target, 1 / update.transition_chunks, update.transition)
        # Nothing from here on can fail, so a boundary that breaks off has not begun.
        self.update, self.announced, self.step, self.embeds = update, False, 1, embeds
        self.source, self.target = source, None if source is None else target
        return PromptChange(update.policy, is_first=True)

    def _step(self) -> PromptChange:
        assert self.update is not None
        assert self.source is not None
        assert self.target is not None
        share = (self.step + 1) / self.update.transition_chunks
        self.embeds = interpolate(self.source, self.target, share, self.update.transition)
        self.step += 1
        if share >= 1:
            self.source = self.target = None
        return PromptChange(self.update.policy, is_first=False)


@dataclass
class SessionState:
    """One user's mutable state; nothing else in the engine changes while a session runs.

    Attributes:
        cache: Self-attention keys and values, and the stream position.
        decoder: Temporal caches of the VAE decoder; None when the engine has no VAE.
        prompt: Prompt in force and waiting.
        text: Cross-attention keys and values of the prompt in force; None until a chunk first needs them.
        latents: Clean latents ``[1, 16, F, h, w]`` of every context pass that still has a frame in the cache, by the
            position of the pass's first frame.
        cache_is_stale: Whether the cache must be rebuilt from ``latents`` before anything reads it.
        chunk_index: Index of the next chunk.
        scene_chunks: Chunks generated (not given) since the scene began.
        rebuilt_chunk: Chunk before which the cache was last rebuilt on demand; -1 if never.
        failed: Why the session cannot go on, or None.
    """

    cache: KeyValueCache
    decoder: DecoderState | None
    prompt: PromptState = field(default_factory=PromptState)
    text: TextMemory | None = None
    latents: dict[int, Tensor] = field(default_factory=dict)
    cache_is_stale: bool = False
    chunk_index: int = 0
    scene_chunks: int = 0
    rebuilt_chunk: int = -1
    failed: str | None = None

    @property
    def position(self) -> int:
        """Latent frames of the stream so far."""
        return self.cache.cursor.end

    @property
    def begins_scene(self) -> bool:
        """Whether the next frame is the first of a scene."""
        return self.cache.cursor.end == self.cache.cursor.origin

    def nbytes_by_part(self) -> dict[str, int]:
        """Return the bytes of ``self_attention``, ``cross_attention``, ``decoder``, ``latents`` and ``prompt``."""
        return {
            "self_attention": self.cache.nbytes,
            "cross_attention": self.text.nbytes if self.text else 0,
            "decoder": self.decoder.nbytes if self.decoder else 0,
            "latents": sum(t.nbytes for t in self.latents.values()),
            "prompt": sum(t.nbytes for t in self.prompt.tensors().values()),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.nbytes_by_part().values())

    def remember(self, latents: Tensor, pass_frames: int) -> None:
        """Keep the newest committed frames, and let go of passes that left the cache.

        Args:
            latents: ``[1, 16, F, h, w]``, ending at :attr:`position`.
            pass_frames: Frames that each context pass wrote; the last may have written fewer.
        """
        first = self.position - latents.shape[2]
        for i, written in enumerate(split_passes(latents, pass_frames)):
            self.latents[first + i * pass_frames] = written.clone()
        held = self.cache.held_positions()
        self.latents = {
            start: kept
            for start, kept in self.latents.items()
            if any(position in range(start, start + kept.shape[2]) for position in held)
        }

    def held_runs(self) -> list[tuple[int, Tensor]]:
        """Return the frames in the cache as consecutive runs, oldest first, each the held part of one context pass.

        Returns:
            Position of a run's first frame, and its latents ``[1, 16, F, h, w]``.

        Raises:
            SessionStateError: If the latents of a frame in the cache are not known.
        """
        owners = {start + i: start for start, kept in self.latents.items() for i in range(kept.shape[2])}
        runs: list[range] = []
        for position in self.cache.held_positions():
            if position not in owners:
                raise SessionStateError(f"the latents of frame {position} were not kept", reason="NOT_EXACT")
            joins = runs and position == runs[-1].stop and owners[position] == owners[runs[-1].start]
            runs.append(range(runs.pop().start if joins else position, position + 1))
        kept = [(run, self.latents[owners[run.start]], owners[run.start]) for run in runs]
        return [(run.start, latents[:, :, run.start - owner : run.stop - owner]) for run, latents, owner in kept]

    def forget(self, change: PromptChange) -> None:
        """Drop the frames that a prompt change's policy does not want to remember."""
        if not change.is_first or not self.position:
            return
        if change.policy is SwitchPolicy.FLUSH:
            self.failed = "a flush broke off half-way"  # unlike all other work, moving rows cannot be done twice
            self.cache.flush(FLUSH_KEEP_FRAMES)
            self.failed = None
        elif change.policy is SwitchPolicy.SCENE_CUT:
            self.cache.begin_scene()
            self.latents.clear()
            self.scene_chunks = 0

    def reset(self) -> None:
        """Return to the state of a fresh session, keeping the allocations."""
        self.cache.cursor = CacheCursor(ring_start=self.cache.layout.sink_frames)
        if self.decoder is not None:
            self.decoder.reset()
        self.prompt = PromptState()
        self.text = None
        self.latents = {}
        self.cache_is_stale = False
        self.chunk_index = self.scene_chunks = 0
        self.rebuilt_chunk = -1
        self.failed = None
