"""What the deployments need of an engine, as protocols, and what loads the configured one.

A deployment never touches torch: it hands packed values to one of these on its worker thread. The model is in
:mod:`serve.model_engines`; `engine: simulated` (:mod:`serve.simulated`) satisfies the same protocols without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from causal_forcing.config import SessionConfig
from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from causal_forcing.startup import StartUp

from .codecs.frames import Pixels
from .config import ServiceConfig
from .logs import LOGGER
from .messages import GeneratedChunk, PackedEmbedding, PackedTensor, Resume
from .metrics import SILENT, Recorder

WARM_UP = PromptUpdate((WeightedPrompt("warm up"),), prompt_id="warm-up")
"""What is generated before a replica says that it is ready."""


class GeneratorSession(Protocol):
    """One user's stream in the generator."""

    @property
    def cache_bytes(self) -> int:
        """Memory of its keys and values."""
        ...

    def update_prompt(self, update: PromptUpdate, embeddings: Sequence[PackedEmbedding]) -> None:
        """Set what the next chunk shows."""
        ...

    def start_from(self, latents: PackedTensor) -> GeneratedChunk:
        """Begin with given latents and return them, committed, as chunk 0."""
        ...

    def generate(self, should_stop: Callable[[], bool]) -> GeneratedChunk | None:
        """Return the next chunk, committed; None if ``should_stop`` said so between two steps.

        Raises:
            DeviceFault: If the device failed; likewise ``OutOfMemory`` and ``NonFiniteOutput``.
        """
        ...


class GeneratorEngine(Protocol):
    """A generator's weights."""

    @property
    def cache_limit_bytes(self) -> int:
        """Memory of the keys and values of the largest session that is allowed."""
        ...

    def open(self, config: SessionConfig) -> GeneratorSession:
        """Return a fresh session."""
        ...

    def resume(self, config: SessionConfig, resume: Resume) -> GeneratorSession:
        """Return a session that goes on where another generator's was seen last."""
        ...

    def warm_up(self) -> None:
        """Do once what every first chunk would pay for."""
        ...


class DecoderStream(Protocol):
    """One user's stream in the decoder."""

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        ...

    def reset(self) -> None:
        """Begin a scene."""
        ...

    def decode(self, latents: PackedTensor) -> Sequence[Pixels]:
        """Return the pixel frames of the next latent frames, ``[H, W, 3]`` uint8 each."""
        ...


class DecoderEngine(Protocol):
    """A decoder's weights."""

    @property
    def min_frame_bytes(self) -> int:
        """Encoded frames are padded to this size; 0 outside of simulations."""
        ...

    def open(self, height: int, width: int) -> DecoderStream:
        """Return a fresh stream of that frame size."""
        ...

    def encode_image(self, frame: Pixels) -> PackedTensor:
        """Return the latents ``[1, 16, 1, h, w]`` of one frame ``[H, W, 3]``."""
        ...

    def warm_up(self) -> None:
        """Do once what every first chunk would pay for."""
        ...


class TextEngine(Protocol):
    """A text encoder's weights."""

    @property
    def cached_bytes(self) -> int:
        """Memory of the embeddings that are kept."""
        ...

    @property
    def cache_limit_bytes(self) -> int:
        """Most of it."""
        ...

    def encode(self, texts: Sequence[str]) -> list[PackedEmbedding]:
        """Return one embedding per text; each depends on its text alone."""
        ...


def load_generator(config: ServiceConfig, recorder: Recorder = SILENT) -> GeneratorEngine:
    """Return the configured generator, loaded and warm."""
    engine: GeneratorEngine
    startup = StartUp(_log_warm_up)
    if config.engine == "simulated":
        from .simulated import SimulatedGenerator

        with startup.phase("load"):
            engine = SimulatedGenerator(config)
    else:
        from .model_engines import ModelGenerator

        engine = ModelGenerator(config, startup)
    with startup.phase("first chunk"):
        engine.warm_up()
    LOGGER.info("generator ready: cold start %s", startup)
    warm_up_s = startup.phases.get("compile", 0.0) + startup.phases["first chunk"]
    recorder.ready(startup.total_s - warm_up_s, warm_up_s)
    recorder.cache_limit("kv", config.generator.sessions_per_replica * engine.cache_limit_bytes)
    return engine


def load_decoder(config: ServiceConfig, recorder: Recorder = SILENT) -> DecoderEngine:
    """Return the configured decoder, loaded and warm."""
    engine: DecoderEngine
    start = time.perf_counter()
    if config.engine == "simulated":
        from .simulated import SimulatedDecoder

        engine = SimulatedDecoder(config)
    else:
        from .model_engines import ModelDecoder

        engine = ModelDecoder(config)
    loaded = time.perf_counter()
    engine.warm_up()
    recorder.ready(loaded - start, time.perf_counter() - loaded)
    return engine


def load_text(config: ServiceConfig, recorder: Recorder = SILENT) -> TextEngine:
    """Return the configured text encoder, loaded and warm."""
    engine: TextEngine
    start = time.perf_counter()
    if config.engine == "simulated":
        from .simulated import SimulatedText

        engine = SimulatedText(config)
    else:
        from .model_engines import ModelText

        engine = ModelText(config)
    loaded = time.perf_counter()
    engine.encode([WARM_UP.prompts[0].text])
    recorder.ready(loaded - start, time.perf_counter() - loaded)
    recorder.cache_limit("text", engine.cache_limit_bytes)
    return engine


def _log_warm_up(done: int, total: int) -> None:
    LOGGER.info("compiling: %d of %d chunks", done, total)
