"""What a gateway keeps of a session, so that another generator or decoder can go on with it: megabytes, and bounded.

A generator needs the latents of the frames in the model's window, and the prompts; a decoder needs the last latent
frames of the scene. Both are here once, copied out of the shared memory they came in.
"""

from __future__ import annotations

from causal_forcing.config import SessionConfig
from causal_forcing.prompts import PromptUpdate
from causal_forcing.resume import StreamPoint
from serve.messages import PRIME_FRAMES, GeneratedChunk, PackedEmbedding, PackedTensor, Resume, ShownPrompt

MAX_PROMPTS = 4
"""Prompts kept of a chain of transitions that were each broken off by the next; what came before fades out of it."""


class SessionMemory:
    """One session's newest latents and the prompts that make the next chunk.

    Args:
        config: The session's.
        reach_frames: Latent frames that a decoder needs before a chunk.

    Attributes:
        config: The session's.
    """

    def __init__(self, config: SessionConfig, reach_frames: int = PRIME_FRAMES) -> None:
        self.config = config
        self._reach_frames = reach_frames
        self._pieces: list[tuple[int, PackedTensor]] = []
        self._prompts: list[ShownPrompt] = []
        self._point: StreamPoint | None = None

    @property
    def next_chunk(self) -> int:
        """The chunk that comes next."""
        return self._point.chunk_index if self._point is not None else 0

    @property
    def nbytes(self) -> int:
        """Memory of the latents and the embeddings."""
        embeddings = {e.key: e.tensor.nbytes for prompt in self._prompts for e in prompt.embeddings}
        return sum(latents.nbytes for _, latents in self._pieces) + sum(embeddings.values())

    def clear(self) -> None:
        """Let go of everything; a session that is over may be kept in memory for a while by whoever ended it."""
        self._pieces, self._prompts, self._point = [], [], None

    def commit(self, chunk: GeneratedChunk) -> None:
        """Take in a chunk: from here on it is part of the session, wherever that goes on."""
        self._point = chunk.point
        self._pieces.append((chunk.point.cursor.end - chunk.latents.frames, chunk.latents.copy()))
        self._forget_prompts(chunk.index)
        self._forget_latents(chunk.latents.frames)

    def show(self, chunk: int, update: PromptUpdate, embeddings: tuple[PackedEmbedding, ...]) -> None:
        """Note that a prompt has taken effect with a chunk; to be called before that chunk is committed."""
        self._prompts = [*self._prompts, ShownPrompt(chunk, update, embeddings)][-MAX_PROMPTS:]

    def before(self, chunk: GeneratedChunk) -> PackedTensor | None:
        """Return the latent frames before a chunk that a decoder needs to go on with it; None if there is none."""
        cursor = chunk.point.cursor
        end = cursor.end - chunk.latents.frames
        first = max(cursor.origin, end - self._reach_frames)
        parts = []
        for start, latents in self._pieces:
            low, high = max(first, start), min(end, start + latents.frames)
            if low < high:
                parts.append(latents.frame_slice(low - start, high - start))
        return PackedTensor.join_frames(parts) if parts else None

    def resume(self) -> Resume | None:
        """Return what another generator needs to go on; None before the first chunk."""
        if self._point is None:
            return None
        sink, rolling = self._point.held_ranges(self.config)
        held = [
            (start, latents)
            for start, latents in self._pieces
            if _overlap(start, latents, sink) or _overlap(start, latents, rolling)
        ]
        return Resume(self._point, tuple(held), tuple(self._prompts))

    def _forget_prompts(self, chunk: int) -> None:
        """Let go of prompts that the newest one's transition does not come from any more."""
        if self._prompts and chunk - self._prompts[-1].chunk + 1 >= self._prompts[-1].update.transition_chunks:
            del self._prompts[:-1]

    def _forget_latents(self, chunk_frames: int) -> None:
        assert self._point is not None
        sink, rolling = self._point.held_ranges(self.config)
        cursor = self._point.cursor
        decoder = range(max(cursor.origin, cursor.end - chunk_frames - self._reach_frames), cursor.end)
        self._pieces = [
            (start, latents)
            for start, latents in self._pieces
            if any(_overlap(start, latents, needed) for needed in (sink, rolling, decoder))
        ]


def _overlap(start: int, latents: PackedTensor, frames: range) -> bool:
    return max(start, frames.start) < min(start + latents.frames, frames.stop)
