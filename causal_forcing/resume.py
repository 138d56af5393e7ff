"""Continuing a stream elsewhere from what was seen of it: a few integers, its last latents and its prompts.

This is the ``fast`` restore of a :class:`~causal_forcing.record.SessionRecord` for one who keeps no record: whoever
reads a session's chunks keeps the :class:`StreamPoint` of the newest, the latents of the frames that the cache holds
there, and the prompts that are not over. The keys and values are recomputed from those latents, so what follows is
close to what the lost session would have made, not equal to it. The values here need no torch: a gateway can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from causal_forcing.config import SessionConfig
from causal_forcing.cursor import CacheCursor
from causal_forcing.prompts import PromptEmbedding, PromptUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from causal_forcing.engine import Engine
    from causal_forcing.session import Session
    from causal_forcing.state import PromptState, SessionState


@dataclass(frozen=True)
class StreamPoint:
    """Where a stream stands after a chunk.

    Attributes:
        chunk_index: The next chunk.
        scene_chunks: Chunks generated (not given) since the scene began.
        cursor: Which frames its cache holds.
    """

    chunk_index: int
    scene_chunks: int
    cursor: CacheCursor

    @classmethod
    def of(cls, state: SessionState) -> StreamPoint:
        """Return where a session stands."""
        return cls(state.chunk_index, state.scene_chunks, state.cache.cursor)

    def held_ranges(self, config: SessionConfig) -> tuple[range, range]:
        """Return the frames that the cache holds: of the sink, and of the rolling window."""
        return self.cursor.held(config.sink_frames, config.cache_frames - config.sink_frames)


@dataclass(frozen=True)
class AppliedPrompt:
    """A prompt update that has taken effect.

    Attributes:
        chunk: The first chunk made under it.
        update: The update.
        embeddings: One per prompt.
    """

    chunk: int
    update: PromptUpdate
    embeddings: Sequence[PromptEmbedding]


def resume_session(
    engine: Engine,
    config: SessionConfig,
    point: StreamPoint,
    latents: Mapping[int, Tensor],
    prompts: Sequence[AppliedPrompt],
) -> Session:
    """Return a session that continues after the chunk that ``point`` was taken at.

    Args:
        engine: Of the model that made the stream.
        config: The stream's.
        point: Where it stands.
        latents: ``[1, 16, F, h, w]`` by the position of the first frame; together all frames of
            :meth:`StreamPoint.held_ranges`, cut where chunks were.
        prompts: The update in force, and before it those that its transition comes from, oldest first; at least one.

    Raises:
        SessionStateError: If the latents of a frame that the cache holds are missing (reason ``NOT_EXACT``).
    """
    import torch

    from causal_forcing.state import split_passes

    session = engine.new_session(config)
    state, pass_frames = session.state, engine.preset.chunk_frames
    with torch.inference_mode():
        _replay(state.prompt, prompts, point.chunk_index)
        assert state.prompt.embeds is not None
        state.text = engine.transformer.read_text(state.prompt.embeds)
        state.cache.cursor = point.cursor
        state.chunk_index, state.scene_chunks = point.chunk_index, point.scene_chunks
        for start, some in latents.items():
            for number, written in enumerate(split_passes(some.to(engine.device, engine.dtype), pass_frames)):
                state.latents[start + number * pass_frames] = written
    session.rebuild_cache()
    return session


def _replay(state: PromptState, prompts: Sequence[AppliedPrompt], next_chunk: int) -> None:
    """Bring prompt and transition to where they were after chunk ``next_chunk - 1``."""
    ends = [*(prompt.chunk for prompt in prompts[1:]), next_chunk]
    for prompt, end in zip(prompts, ends, strict=True):
        state.submit(prompt.update, list(prompt.embeddings))
        steps = max(1, prompt.update.transition_chunks)
        for chunk in range(prompt.chunk, min(end, prompt.chunk + steps)):
            state.begin_chunk(chunk)
    state.chunk, state.announced = next_chunk - 1, True
