"""An accelerator that only sleeps: the whole service around it is real, so its own cost can be measured.

Latents carry the session's seed, the chunk and the prompt, and frames show them as colours, so that a test can tell
whose frame it is looking at.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from causal_forcing.config import SessionConfig
from causal_forcing.cursor import CacheCursor
from causal_forcing.geometry import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE, Geometry
from causal_forcing.prompts import PromptUpdate, SwitchPolicy
from causal_forcing.resume import StreamPoint

from .codecs.frames import Pixels
from .config import ServiceConfig
from .messages import GeneratedChunk, PackedEmbedding, PackedTensor, Resume
from .metrics.drift import LatentStats
from .planted import strike

STEPS = 4
"""Passes of a chunk, the last one being the context pass; it can be stopped between two."""

MARK_BITS = 15
"""Bits of each number that the latents carry."""

FLAT = LatentStats((0.0,) * LATENT_CHANNELS, (1.0,) * LATENT_CHANNELS)
"""Statistics of every chunk: nothing ever drifts."""


def mark(value: int) -> int:
    """Return what is left of a number in the latents."""
    return value % (1 << MARK_BITS)


class SimulatedGenerator:
    """Sleeps ``chunk_ms`` a chunk."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config

    @property
    def cache_limit_bytes(self) -> int:
        """Memory of a session."""
        return SimulatedSession.cache_bytes

    def open(self, config: SessionConfig) -> SimulatedSession:
        """Return a fresh session."""
        return SimulatedSession(config, self._config)

    def resume(self, config: SessionConfig, resume: Resume) -> SimulatedSession:
        """Return a session that counts on."""
        session = SimulatedSession(config, self._config)
        session.go_on(resume)
        return session

    def warm_up(self) -> None:
        """Return: there is nothing to warm."""


class SimulatedSession:
    """Counts chunks."""

    cache_bytes = 1 << 20

    def __init__(self, config: SessionConfig, service: ServiceConfig) -> None:
        self._config = config
        self._frames = service.model_preset.chunk_frames
        self._step_s = service.simulation.chunk_ms / 1000 / STEPS
        self._index = 0
        self._starts_scene = True
        self._cursor = CacheCursor(ring_start=config.sink_frames)
        self._fault_dir = service.simulation.fault_dir
        self._pending: PromptUpdate | None = None
        self._prompt: PromptUpdate | None = None
        self._text_mark = 0

    def update_prompt(self, update: PromptUpdate, embeddings: Sequence[PackedEmbedding]) -> None:
        """Set what the next chunk shows."""
        self._pending = update
        self._text_mark = mark(zlib.crc32("".join(e.key for e in embeddings).encode()))

    def go_on(self, resume: Resume) -> None:
        """Take up another session where it stood."""
        self.update_prompt(resume.prompts[-1].update, resume.prompts[-1].embeddings)
        self._prompt, self._pending = self._pending, None
        self._index, self._starts_scene = resume.point.chunk_index, False
        self._cursor = resume.point.cursor

    def generate(self, should_stop: Callable[[], bool]) -> GeneratedChunk | None:
        """Return the next chunk after its time, or None if stopped."""
        strike(self._fault_dir)
        for _ in range(STEPS):
            if should_stop():
                return None
            time.sleep(self._step_s)
        data = np.zeros(self._config.geometry.latent_shape(self._frames), np.int16)
        data[0, 0, :, 0, 0] = mark(self._config.seed)
        data[0, 1, :, 0, 0] = mark(self._index)
        data[0, 2, :, 0, 0] = self._text_mark
        return self._commit(PackedTensor(data, "bfloat16"))

    def start_from(self, latents: PackedTensor) -> GeneratedChunk:
        """Begin with given latents."""
        return self._commit(latents)

    def _commit(self, latents: PackedTensor) -> GeneratedChunk:
        applied, self._pending = self._pending, None
        if applied is not None:
            self._prompt = applied
            self._starts_scene |= applied.policy is SwitchPolicy.SCENE_CUT
        assert self._prompt is not None
        chunk = GeneratedChunk(
            index=self._index,
            latents=latents,
            starts_scene=self._starts_scene,
            prompt_id=self._prompt.prompt_id,
            prompt_applied=applied is not None,
            point=self._advance(latents.frames),
            context_s=self._step_s,
            recaches=int(applied is not None and applied.policy is SwitchPolicy.RECACHE),
            stats=FLAT,
        )
        self._index, self._starts_scene = self._index + 1, False
        return chunk

    def _advance(self, frames: int) -> StreamPoint:
        cursor = self._cursor
        if self._starts_scene:
            cursor = CacheCursor(cursor.end, cursor.end + self._config.sink_frames, cursor.end)
        self._cursor = replace(cursor, end=cursor.end + frames)
        return StreamPoint(self._index + 1, 1, self._cursor)


class SimulatedDecoder:
    """Sleeps ``decode_ms`` a chunk and draws."""

    def __init__(self, config: ServiceConfig) -> None:
        self._sleep_s = config.simulation.decode_ms / 1000 / config.model_preset.chunk_frames
        self._picture_px = config.simulation.picture_px
        self._fault_dir = config.simulation.fault_dir
        self.min_frame_bytes = config.simulation.frame_bytes

    def open(self, height: int, width: int) -> SimulatedStream:
        """Return a fresh stream."""
        return SimulatedStream(height, width, self._sleep_s, self._picture_px, self._fault_dir)

    def encode_image(self, frame: Pixels) -> PackedTensor:
        """Return latents that carry the frame's mean colour."""
        height, width = frame.shape[:2]
        data = np.zeros(Geometry(height, width).latent_shape(1), np.int16)
        data[0, :3, 0, 0, 0] = frame.reshape(-1, 3).mean(axis=0).round()
        return PackedTensor(data, "bfloat16")

    def warm_up(self) -> None:
        """Return: there is nothing to warm."""


class SimulatedStream:
    """Draws what the latents carry: red the seed, green the chunk, blue the prompt."""

    nbytes = 1 << 20

    def __init__(
        self, height: int, width: int, sleep_s: float, picture_px: int | None = None, fault_dir: Path | None = None
    ) -> None:
        self._fault_dir = fault_dir
        self._latent_rows = height // SPATIAL_STRIDE
        self._shape = (picture_px or height, picture_px or width, 3)
        self._sleep_s = sleep_s
        self._decoded = 0

    def reset(self) -> None:
        """Begin a scene."""
        self._decoded = 0

    def decode(self, latents: PackedTensor) -> Sequence[Pixels]:
        """Return one flat picture for a scene's first latent frame and four for every other."""
        assert latents.data.shape[3] == self._latent_rows
        strike(self._fault_dir, "decoder-")
        frames: list[Pixels] = []
        for frame in range(latents.frames):
            time.sleep(self._sleep_s)
            colour = (latents.data[0, :3, frame, 0, 0] % 256).astype(np.uint8)
            count = TEMPORAL_STRIDE if self._decoded else 1
            frames += [np.broadcast_to(colour, self._shape).copy() for _ in range(count)]
            self._decoded += 1
        return frames


class SimulatedText:
    """Sleeps ``encode_ms`` a batch."""

    cached_bytes = cache_limit_bytes = 0

    def __init__(self, config: ServiceConfig) -> None:
        self._sleep_s = config.simulation.encode_ms / 1000
        self._fault_dir = config.simulation.fault_dir

    def encode(self, texts: Sequence[str]) -> list[PackedEmbedding]:
        """Return an embedding of one number per text."""
        strike(self._fault_dir, "text-")
        time.sleep(self._sleep_s)
        keys = [f"{zlib.crc32(text.encode()):08x}" for text in texts]
        return [PackedEmbedding(key, PackedTensor(np.zeros((1, 1, 1), np.float32), "float32")) for key in keys]
