"""The engines of a service: the model behind the protocols of :mod:`serve.engines`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from causal_forcing.config import SessionConfig
from causal_forcing.device_errors import device_errors
from causal_forcing.errors import NonFiniteOutput
from causal_forcing.prompts import PromptEmbedding, PromptUpdate
from causal_forcing.resume import AppliedPrompt, StreamPoint, resume_session
from causal_forcing.startup import StartUp

from .codecs.frames import Pixels
from .config import ServiceConfig, WorkerConfig
from .engines import WARM_UP
from .messages import GeneratedChunk, PackedEmbedding, PackedTensor, Resume
from .metrics.drift import LatentStats

if TYPE_CHECKING:
    from torch import Tensor

    from causal_forcing.engine import Engine
    from causal_forcing.session import Chunk, Session
    from causal_forcing.text_encoder import TextEncoder
    from causal_forcing.vae import DecoderState, Vae


class ModelGenerator:
    """The causal transformer."""

    def __init__(self, config: ServiceConfig, startup: StartUp | None = None) -> None:
        startup = startup or StartUp()
        with startup.phase("import"):
            from causal_forcing.engine import Engine
            from causal_forcing.weights.memory import require_memory

            _use_threads(config.generator)
        self._config = config
        if config.generator.sessions_per_replica > 1:  # the engine itself looks for room for one
            require_memory(config.generator_memory(), config.device)
        self._engine: Engine = Engine.load(
            config.preset,
            device=config.device,
            vae=None,
            text_encoder=False,
            weights_dir=config.weights_dir,
            quantization=config.generator.quantization,
            compiled=config.generator.compile,
            session=config.session_config(),
            startup=startup,
        )
        if config.generator.compile:
            from causal_forcing.compile import warm_up

            with startup.phase("compile"):
                for height, width in config.allowed_sizes[1:]:
                    session = config.session_config(height=height, width=width)
                    warm_up(self._engine, session, progress=startup.on_warm_up)

    @device_errors()
    def open(self, config: SessionConfig) -> ModelSession:
        """Return a fresh session."""
        return ModelSession(self._engine.new_session(config))

    @device_errors()
    def resume(self, config: SessionConfig, resume: Resume) -> ModelSession:
        """Return a session that goes on from its last latents."""
        latents = {start: some.unpack() for start, some in resume.latents}
        prompts = [
            AppliedPrompt(shown.chunk, shown.update, unpack_embeddings(shown.embeddings, self._engine))
            for shown in resume.prompts
        ]
        return ModelSession(resume_session(self._engine, config, resume.point, latents, prompts))

    @property
    def cache_limit_bytes(self) -> int:
        """Memory of the keys and values of the largest session that is allowed."""
        from causal_forcing.weights.memory import cache_bytes

        return sum(cache_bytes(self._engine.preset, self._config.largest_session(), self._engine.dtype))

    def warm_up(self) -> None:
        """Generate two chunks of the default session, a scene's first and a later one."""
        session = self.open(self._config.session_config())
        sizes = self._engine.preset.transformer
        blank = PackedTensor(np.zeros((1, sizes.text_len, sizes.text_dim), np.float32), "float32")
        session.update_prompt(WARM_UP, [PackedEmbedding("warm-up", blank)])
        for _ in range(2):
            session.generate(lambda: False)


class ModelSession:
    """An engine session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def cache_bytes(self) -> int:
        """Memory of its keys and values."""
        parts = self._session.state.nbytes_by_part()
        return parts["self_attention"] + parts["cross_attention"]

    @device_errors()
    def update_prompt(self, update: PromptUpdate, embeddings: Sequence[PackedEmbedding]) -> None:
        """Set what the next chunk shows."""
        self._session.update_prompt(update, unpack_embeddings(embeddings, self._session.engine))

    @device_errors()
    def start_from(self, latents: PackedTensor) -> GeneratedChunk:
        """Begin with given latents."""
        return _packed(self._session, self._session.start_from(latents.unpack()))

    @device_errors()
    def generate(self, should_stop: Callable[[], bool]) -> GeneratedChunk | None:
        """Return the next chunk on the host, or None if stopped."""
        from causal_forcing.sampler import Stopped

        before = self._session.rebuilds
        try:
            chunk = _packed(self._session, self._session.generate_chunk(should_stop=should_stop))
        except Stopped:
            return None
        return replace(chunk, recaches=self._session.rebuilds - before)


def _packed(session: Session, chunk: Chunk) -> GeneratedChunk:
    """Return a session's newest chunk on the host, checked."""
    chunk.require_finite()
    return GeneratedChunk(
        index=chunk.index,
        latents=PackedTensor.pack(chunk.latents),
        starts_scene=chunk.starts_scene,
        prompt_id=chunk.prompt_id,
        prompt_applied=chunk.prompt_applied,
        point=StreamPoint.of(session.state),
        context_s=chunk.context_s,
        stats=LatentStats.of(chunk.latents),
    )


class ModelDecoder:
    """A VAE."""

    min_frame_bytes = 0

    def __init__(self, config: ServiceConfig) -> None:
        from causal_forcing.weights import load_vae

        _use_threads(config.vae_decoder)
        self._config = config
        self._vae: Vae = load_vae(config.model_preset, config.vae, config.weights_dir, device=config.device)

    @device_errors()
    def open(self, height: int, width: int) -> ModelStream:
        """Return a fresh stream of that frame size."""
        from causal_forcing.geometry import Geometry

        return ModelStream(self._vae, self._vae.new_decoder_state(Geometry(height, width)))

    @device_errors()
    def encode_image(self, frame: Pixels) -> PackedTensor:
        """Return the latents of one frame."""
        import torch

        from causal_forcing.geometry import Geometry
        from causal_forcing.media import from_frames

        state = self._vae.new_encoder_state(Geometry(*frame.shape[:2]))
        some = next(iter(state.buffers.values()))
        with torch.inference_mode():
            pixels = from_frames(frame[None]).to(some.device, some.dtype)
            return PackedTensor.pack(_finite(self._vae.encode(pixels, state)))

    def warm_up(self) -> None:
        """Decode two latent frames of the native size, a scene's first and a later one."""
        from causal_forcing.geometry import Geometry

        geometry = Geometry(*self._config.allowed_sizes[0])
        stream = self.open(geometry.height, geometry.width)
        for _ in range(2):
            stream.decode(PackedTensor(np.zeros(geometry.latent_shape(1), np.float32), "float32"))


class ModelStream:
    """A decoder state with its VAE."""

    def __init__(self, vae: Vae, state: DecoderState) -> None:
        self._vae = vae
        self._state = state

    @property
    def nbytes(self) -> int:
        """Memory of the state."""
        return self._state.nbytes

    @device_errors()
    def reset(self) -> None:
        """Begin a scene."""
        self._state.reset()

    @device_errors()
    def decode(self, latents: PackedTensor) -> Sequence[Pixels]:
        """Return the pixel frames of the next latent frames."""
        import torch

        from causal_forcing.media import to_frames

        some = next(iter(self._state.buffers.values()))
        with torch.inference_mode():
            video = self._vae.decode(latents.unpack().to(some.device, some.dtype), self._state)
            return list(to_frames(_finite(video).float()))


class ModelText:
    """A UMT5 encoder with its cache."""

    def __init__(self, config: ServiceConfig) -> None:
        from causal_forcing.weights import load_text_encoder

        _use_threads(config.text_encoder)
        self._encoder: TextEncoder = load_text_encoder(config.model_preset, config.weights_dir, device=config.device)

    @property
    def cached_bytes(self) -> int:
        """Memory of the embeddings that are kept."""
        return self._encoder.cached_bytes

    @property
    def cache_limit_bytes(self) -> int:
        """Most of it."""
        return self._encoder.cache_bytes

    @device_errors()
    def encode(self, texts: Sequence[str]) -> list[PackedEmbedding]:
        """Return one embedding per text."""
        return [PackedEmbedding(e.key, PackedTensor.pack(_finite(e.embeds))) for e in self._encoder.encode(texts)]


def _finite(tensor: Tensor) -> Tensor:
    """Return a tensor that holds neither NaN nor infinity.

    Raises:
        NonFiniteOutput: If it does.
    """
    if not bool(tensor.isfinite().all()):
        raise NonFiniteOutput("a device has made NaN or infinity of finite numbers")
    return tensor


def unpack_embeddings(embeddings: Sequence[PackedEmbedding], engine: Engine) -> list[PromptEmbedding]:
    """Return embeddings on an engine's device."""
    return [PromptEmbedding(e.tensor.unpack().to(engine.device, engine.dtype), e.key) for e in embeddings]


def _use_threads(worker: WorkerConfig) -> None:
    import torch

    torch.set_num_threads(worker.threads)
