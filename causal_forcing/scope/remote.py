"""Chunks from a Causal Forcing server, so that a computer without a GPU can use a cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.prompts import PromptUpdate, SwitchPolicy
from serve.client import Frame, Started, StreamOptions, VideoClient, VideoServiceError

from .requests import ChunkRequest, Start, chosen_numbers

if TYPE_CHECKING:
    from serve.client import VideoSession
    from serve.codecs.frames import Pixels

    from .schema import CausalForcingConfig

API_KEY_VARIABLE = "CAUSAL_FORCING_API_KEY"
"""Environment variable with the key that the server asks for, if it does."""


class RemoteBackend:
    """One session on a server; a lost one is replaced by a new one at the next call."""

    def __init__(
        self,
        config: CausalForcingConfig,
        loras: Sequence[Mapping[str, Any]],
        model_dir: str | Path | None,
        device: str | None,
    ) -> None:
        _refuse(config, {"loras": loras, "model_dir": model_dir, "device": device, "quantization": config.quantization})
        self._config = config
        self._start: Start | None = None
        self._update: PromptUpdate | None = None
        self._awaited = ""  # after a reset, frames under any other prompt are of the scene before
        self._session: VideoSession | None = None
        self._opened = ExitStack()
        key = os.environ.get(API_KEY_VARIABLE)
        metadata = [("authorization", f"Bearer {key}")] if key else []
        self._stack = ExitStack()
        self._client = self._stack.enter_context(VideoClient(config.server, metadata=metadata))

    def next_chunk(self, request: ChunkRequest) -> Tensor:
        """Return the next chunk's frames ``[T, H, W, 3]``, float32 in [0, 1].

        Raises:
            VideoServiceError: If the session failed; the next call opens a new one.
            InvalidRequest: If the server decodes with another VAE than was asked for.
        """
        update = request.update
        start = request.start
        if start is not None and start == self._start and start.image is None and update is not None:
            update = replace(update, policy=SwitchPolicy.SCENE_CUT, transition_chunks=0)  # on the same generator
        elif start is not None:
            self._close_session()
            self._start = start
        self._update = update or self._update
        try:
            return self._chunk(update, resets=start is not None)
        except VideoServiceError:
            self._close_session()
            raise

    def close(self) -> None:
        """End the session and the connection."""
        self._close_session()
        self._stack.close()

    def _chunk(self, update: PromptUpdate | None, *, resets: bool) -> Tensor:
        """Return the next chunk; a session that has reached the server's longest life is followed by another."""
        if self._session is not None and update is not None:
            name = self._session.update_prompt(update)
            self._awaited = name if resets else self._awaited
        for _ in range(2):
            if self._session is None:
                self._open_session()
            video = self._read_chunk()
            if video is not None:
                return video
            self._close_session()
        raise SessionStateError("the server ends its sessions before their first chunk", reason="SESSION_ENDED")

    def _open_session(self) -> None:
        start, update, config = self._start, self._update, self._config
        assert start is not None
        assert update is not None
        options = StreamOptions(
            prompt=replace(update, transition_chunks=0, policy=SwitchPolicy.CROSS_ATTENTION),
            height=config.height,
            width=config.width,
            seed=start.seed,
            denoising_steps=start.denoising_steps,
            **chosen_numbers(config, "window_frames", "sink_frames"),
            start_image=start.image or b"",
            pacing="as_fast_as_possible",  # Scope shows frames at its own pace and asks when it wants more
        )
        self._session = self._opened.enter_context(self._client.stream(options))

    def _close_session(self) -> None:
        self._opened.close()
        self._session, self._awaited = None, ""

    def _read_chunk(self) -> Tensor | None:
        """Return the frames up to the end of a chunk, or None if the server has ended the session."""
        assert self._session is not None
        frames: list[Pixels] = []
        for event in self._session:
            if isinstance(event, Started) and self._config.vae_type not in ("wan", event.model.vae):
                raise InvalidRequest("vae_type", self._config.vae_type, f"must be {event.model.vae}, the server's")
            if isinstance(event, Frame) and self._awaited in ("", event.prompt_id):
                self._awaited = ""
                frames.append(event.pixels())
                if event.last_in_chunk:
                    return torch.from_numpy(np.stack(frames)).float() / 255
        return None


def _refuse(config: CausalForcingConfig, only_in_process: Mapping[str, object]) -> None:
    """Raise for parameters that could have no effect on a server."""
    default = type(config).model_fields["preset"].default
    given = dict(only_in_process) | ({"preset": config.preset} if config.preset != default else {})
    for name, value in given.items():
        if value:
            raise InvalidRequest(name, str(value), "must be left out with server: the server chose its own")
