"""The weights of one model on one device, shared by every session of a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from causal_forcing.compile import compile_transformer, require_compiler, use_compile_cache, warm_up
from causal_forcing.config import SessionConfig
from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.geometry import Geometry
from causal_forcing.noise import NoiseSource
from causal_forcing.presets import Preset, get_preset
from causal_forcing.prompts import PromptEmbedding, PromptUpdate
from causal_forcing.session import Session
from causal_forcing.startup import StartUp
from causal_forcing.transformer import CausalTransformer
from causal_forcing.weights import LoraFile, load_text_encoder, load_transformer, load_vae
from causal_forcing.weights.loading import default_dtype
from causal_forcing.weights.memory import free_bytes, require_memory, required_bytes
from causal_forcing.weights.quantise import quantise, require_quantisation

if TYPE_CHECKING:
    from causal_forcing.text_encoder import TextEncoder
    from causal_forcing.vae import Vae


FEW_TOKENS = 64
"""Up to so many tokens a chunk, a CPU multiplies faster by weights in a layout of its own (measured)."""


def choose_layout(transformer: CausalTransformer, chunk_tokens: int) -> None:
    """Lay a transformer's weights out as suits its device; on a CPU, those of large models stay where they are mapped.

    Args:
        transformer: Loaded, on its device.
        chunk_tokens: Tokens of a chunk at the native size.
    """
    if transformer.device.type == "cuda":
        transformer.lay_out()
    elif chunk_tokens <= FEW_TOKENS:
        transformer.lay_out(chunk_tokens)


@dataclass(frozen=True)
class Engine:
    """Weights and nothing else; any number of sessions may borrow them, one chunk at a time.

    Attributes:
        preset: What the weights are.
        transformer: The generator.
        vae: Decoder and encoder of frames, or None where another process decodes.
        text_encoder: Encoder of prompts, or None where embeddings come from elsewhere.
    """

    preset: Preset
    transformer: CausalTransformer
    vae: Vae | None = None
    text_encoder: TextEncoder | None = None

    @classmethod
    def load(
        cls,
        preset: str | Preset,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        vae: str | None = "wan",
        text_encoder: bool = True,
        weights_dir: Path | None = None,
        loras: Sequence[LoraFile] = (),
        quantization: str | None = None,
        compiled: bool = False,
        session: SessionConfig | None = None,
        given_frames: int = 0,
        startup: StartUp | None = None,
    ) -> Engine:
        """Return an engine with its weights loaded, strictly.

        Args:
            preset: Which model, by name or as a value.
            device: Where to put the weights.
            dtype: What to compute in; None takes float32 on a CPU and bfloat16 on CUDA.
            vae: Which VAE to load with it, or None where frames are not decoded here.
            text_encoder: Whether to load the text encoder, too.
            weights_dir: Folder of weights; None means the embedded ones, or the default download folder.
            loras: Low-rank updates to merge into the generator.
            quantization: ``fp8_e4m3fn`` for 8-bit linear layers on GPUs that compute in it.
            compiled: Whether to compile the generator's passes, and warm them up for ``session`` (minutes on a CPU).
            session: What one session will ask for, which must fit beside the weights; None means the preset's defaults.
            given_frames: Latent frames that it may begin with, whose encoding must fit, too: 1 for a picture.
            startup: Is told how long loading and compiling took, and how far the warm-up is.

        Raises:
            InvalidRequest: If there is no such preset, the preset has no such VAE, the device cannot quantise so, or
                this machine lacks what compiling needs.
            OutOfMemory: If the weights and one session do not fit on the device; nothing is loaded.
            BadCheckpoint: If a file is missing, damaged, of another model, or not finite.
        """
        preset = get_preset(preset) if isinstance(preset, str) else preset
        require_quantisation(quantization, device)
        if compiled:
            require_compiler(device)
        dtype = dtype or default_dtype(device)
        config = session or preset.session_config()
        needed = required_bytes(preset, vae, config, dtype, text_encoder=text_encoder, given_frames=given_frames)
        require_memory(needed, device, free=free_bytes)
        startup = startup or StartUp()
        with startup.phase("load"):
            transformer = load_transformer(preset, weights_dir, device=device, dtype=dtype, loras=loras)
            quantise(transformer, quantization)
            if quantization is None:  # weights of 8 bits cannot be joined
                choose_layout(transformer, preset.chunk_frames * Geometry(preset.height, preset.width).tokens_per_frame)
            engine = cls(
                preset,
                transformer,
                load_vae(preset, vae, weights_dir, device=device, dtype=dtype) if vae else None,
                load_text_encoder(preset, weights_dir, device=device, dtype=dtype) if text_encoder else None,
            )
        if compiled:
            with startup.phase("compile"):
                use_compile_cache()
                compile_transformer(transformer)
                warm_up(engine, session, progress=startup.on_warm_up)
        return engine

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of latents and caches."""
        return self.transformer.dtype

    def session_config(self, **overrides: object) -> SessionConfig:
        """Return the preset's defaults with some fields of :class:`SessionConfig` replaced.

        Raises:
            InvalidRequest: If a value is not allowed.
        """
        return self.preset.session_config(**overrides)

    def new_session(self, config: SessionConfig | None = None, *, noise: NoiseSource | None = None) -> Session:
        """Return a fresh session.

        Args:
            config: What the user asks for; None takes the preset's defaults.
            noise: Replaces the seeded noise, e.g. to replay a reference run.

        Raises:
            InvalidRequest: If the configuration does not suit the model.
        """
        config = config or self.session_config()
        rolling, chunk = config.cache_frames - config.sink_frames, self.preset.chunk_frames
        if rolling < chunk:
            if config.window_frames is None:
                raise InvalidRequest("max_frames", config.max_frames, f"must be at least a chunk ({chunk} frames)")
            allowed = f"must exceed sink_frames ({config.sink_frames}) by at least a chunk ({chunk} frames)"
            raise InvalidRequest("window_frames", config.window_frames, allowed)
        return Session(self, config, noise=noise)

    def encode_prompts(self, update: PromptUpdate) -> list[PromptEmbedding]:
        """Return one embedding per prompt of an update.

        Raises:
            SessionStateError: If the engine was loaded without a text encoder.
        """
        if self.text_encoder is None:
            raise SessionStateError("the engine was loaded without a text encoder", reason="NO_TEXT_ENCODER")
        return self.text_encoder.encode([prompt.text for prompt in update.prompts])
