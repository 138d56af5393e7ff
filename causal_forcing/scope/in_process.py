"""Chunks from an engine in Scope's own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from causal_forcing.config import SessionConfig
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.media import decode_image
from causal_forcing.presets import get_preset
from causal_forcing.session import Session
from causal_forcing.weights import LoraFile

from .requests import ChunkRequest, Start, chosen_numbers

if TYPE_CHECKING:
    from .schema import CausalForcingConfig


class EngineBackend:
    """One engine, loaded once and strictly, and one session of it."""

    def __init__(
        self,
        config: CausalForcingConfig,
        loras: Sequence[Mapping[str, Any]],
        model_dir: str | Path | None,
        device: str | None,
    ) -> None:
        preset = get_preset(config.preset)
        self._session_config: SessionConfig = preset.session_config(
            height=config.height,
            width=config.width,
            **chosen_numbers(config, "window_frames", "sink_frames"),
        )
        self._engine: Engine | None = Engine.load(
            preset,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            vae=config.vae_type,
            weights_dir=None if model_dir is None else Path(model_dir),
            loras=[LoraFile(Path(lora["path"]), float(lora.get("scale", 1.0))) for lora in loras],
            quantization=config.quantization,
            session=self._session_config,
            given_frames=1,
        )
        self._session: Session | None = None

    def next_chunk(self, request: ChunkRequest) -> Tensor:
        """Return the next chunk's frames ``[T, H, W, 3]``, float32 in [0, 1], on the host.

        Raises:
            InvalidRequest: If the start is not allowed; the running session stays as it was.
        """
        given = None
        if request.start is not None:
            given = self._encode_image(request.start)
            self._session = self._begin(request.start)
        session = self._session
        if session is None:
            raise SessionStateError("the stream has not begun", reason="NOT_STARTED")
        if request.update is not None:
            session.update_prompt(request.update)
        chunk = session.generate_chunk() if given is None else session.start_from(given)
        video = session.decode(chunk)
        return video[0].permute(1, 2, 3, 0).add(1).div(2).clamp(0, 1).cpu()

    def close(self) -> None:
        """Let go of weights and session."""
        self._engine = self._session = None

    def _encode_image(self, start: Start) -> Tensor | None:
        """Return the latents of the picture that a stream starts from, if it does."""
        engine = self._open_engine()
        if start.image is None:
            return None
        if engine.vae is None:
            raise InvalidRequest("first_frame_image", "a picture", "needs a VAE")
        with torch.inference_mode():
            pixels = decode_image(start.image, self._session_config.geometry)
            return engine.vae.encode(pixels.to(engine.device, engine.dtype))

    def _begin(self, start: Start) -> Session:
        """Return a session at its beginning; the running one is used again where only its past has to go."""
        config = replace(self._session_config, seed=start.seed)
        if start.denoising_steps:
            config = replace(config, denoising_steps=start.denoising_steps, first_chunk_steps=None)
        if self._session is not None and self._session.config == config:
            self._session.reset()
            return self._session
        self._session = None  # its memory has to go before the next one's comes
        return self._open_engine().new_session(config)

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise SessionStateError("the pipeline was shut down", reason="SHUT_DOWN")
        return self._engine
