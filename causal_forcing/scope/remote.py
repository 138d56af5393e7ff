"""Chunks from a Causal Forcing server, so that a computer without a GPU can use a cluster."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import torch
from torch import Tensor

from causal_forcing.errors import CausalForcingError, InvalidRequest, SessionStateError
from causal_forcing.prompts import PromptUpdate, SwitchPolicy
from serve.client import Frame, PromptRefused, Started, StreamOptions, VideoClient, VideoServiceError

from .requests import ChunkRequest, RefusedPrompt, Start, chosen_numbers

if TYPE_CHECKING:
    from serve.client import VideoSession
    from serve.codecs.frames import Pixels

    from .schema import CausalForcingConfig

API_KEY_VARIABLE = "CAUSAL_FORCING_API_KEY"
"""Environment variable with the key that the server asks for, if it does."""

EXPIRED_REASONS = ("CLIENT_SILENT", "CLIENT_TOO_SLOW")
"""How a server ends a session that nobody asks for frames any more, say because the stream was paused."""


class RefusedByServer(InvalidRequest):
    """Raised when a server does not allow a session like this one; the message is the server's."""

    def __init__(self, error: VideoServiceError) -> None:
        CausalForcingError.__init__(self, error.message, reason=error.reason, metadata={"field": error.field})


class RemoteBackend:
    """One session on a server; a lost one is replaced by a new one at the next call, an expired one at once.

    The session ends with this object, if nothing ends it before.
    """

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
        self._update_before: PromptUpdate | None = None
        self._sent = ""  # name of the last prompt that went to the running session
        self._awaited = ""  # after a reset, frames under any other prompt are of the scene before
        self._frames: list[Pixels] = []  # of the chunk that is coming
        self._session: VideoSession | None = None
        key = os.environ.get(API_KEY_VARIABLE)
        metadata = [("authorization", f"Bearer {key}")] if key else []
        stack = ExitStack()
        self._client = stack.enter_context(VideoClient(config.server, metadata=metadata))
        self._opened = stack.enter_context(ExitStack())
        self._end = weakref.finalize(self, stack.close)

    def next_chunk(self, request: ChunkRequest) -> Tensor:
        """Return the next chunk's frames ``[T, H, W, 3]``, float32 in [0, 1].

        Raises:
            VideoServiceError: If the session failed; the next call opens a new one.
            InvalidRequest: If the server refuses the start, or decodes with another VAE than was asked for.
            RefusedPrompt: If the server does not show the last prompt; the stream goes on under the one before it.
        """
        before = self._start, self._update
        update, start = request.update, request.start
        if start is not None and start == self._start and start.image is None and update is not None:
            update = replace(update, policy=SwitchPolicy.SCENE_CUT, transition_chunks=0)  # on the same generator
        elif start is not None:
            self._close_session()
            self._start = start
        if update is not None:
            self._update_before, self._update = self._update, update
        try:
            return self._chunk(update, resets=start is not None)
        except InvalidRequest:
            self._close_session()
            self._start, self._update = before
            raise
        except VideoServiceError as error:
            self._close_session()
            if error.code is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
            self._start, self._update = before
            raise RefusedByServer(error) from error

    def close(self) -> None:
        """End the session and the connection."""
        self._session = None
        self._end()

    def _chunk(self, update: PromptUpdate | None, *, resets: bool) -> Tensor:
        """Return the next chunk; a session that has expired, or reached its longest life, is followed by another."""
        if self._session is not None and update is not None:
            self._sent = self._session.update_prompt(update)
            self._awaited = self._sent if resets else self._awaited
        for _ in range(2):
            if self._session is None:
                self._open_session()
            try:
                video = self._read_chunk()
            except VideoServiceError as error:
                if error.reason not in EXPIRED_REASONS:
                    raise
                video = None
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
        self._session, self._sent, self._awaited, self._frames = None, "", "", []

    def _read_chunk(self) -> Tensor | None:
        """Return the frames up to the end of a chunk, or None if the server has ended the session."""
        assert self._session is not None
        for event in self._session:
            if isinstance(event, Started) and self._config.vae_type not in ("wan", event.model.vae):
                raise InvalidRequest("vae_type", self._config.vae_type, f"must be {event.model.vae}, the server's")
            if isinstance(event, PromptRefused) and event.prompt_id == self._sent:
                raise self._return_to_prompt_before(event)
            if isinstance(event, Frame) and self._awaited in ("", event.prompt_id):
                self._awaited = ""
                self._frames.append(event.pixels())
                if event.last_in_chunk:
                    frames, self._frames = self._frames, []
                    return torch.from_numpy(np.stack(frames)).float() / 255
        return None

    def _return_to_prompt_before(self, refused: PromptRefused) -> RefusedPrompt:
        """Forget the last prompt; return what to raise."""
        self._update, self._awaited = self._update_before, ""
        message = f"the server refused the prompt: {refused.message}"
        return RefusedPrompt(message, reason=refused.reason, retry_after_s=refused.retry_after_s)


def _refuse(config: CausalForcingConfig, only_in_process: Mapping[str, object]) -> None:
    """Raise for parameters that could have no effect on a server."""
    default = type(config).model_fields["preset"].default
    given = dict(only_in_process) | ({"preset": config.preset} if config.preset != default else {})
    for name, value in given.items():
        if value:
            raise InvalidRequest(name, str(value), "must be left out with server: the server chose its own")
