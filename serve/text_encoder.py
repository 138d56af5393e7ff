"""The text encoder deployment: prompts of all sessions, encoded together and cached by text."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve

from . import logs
from .admission.succession import refusal
from .config import ServiceConfig
from .device import DEVICE_FAULTS, Warden
from .engines import load_text
from .messages import Encoded, PackedEmbedding, Process
from .metrics import Role
from .metrics.process import replica_recorder, watch_replica
from .status import Failure, failure_of


class TextEncoder:
    """A Serve replica that holds the text encoder."""

    async def __init__(self, config: ServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.set_up(config.logs)
        worker = ThreadPoolExecutor(1, thread_name_prefix="device")
        loop = asyncio.get_running_loop()
        self._recorder = replica_recorder(Role.TEXT_ENCODER)
        self._engine = await loop.run_in_executor(worker, load_text, config, self._recorder)
        self._warden = Warden(worker, config.text_encoder.step_timeout_s, self._recorder.device_fault)
        self._model = config.model_key
        replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._process = Process(replica_id, os.getpid(), ray.get_runtime_context().get_node_id())
        watch_replica(self._recorder, config, Role.TEXT_ENCODER)
        batching: Any = self.encode_batch  # Serve's decorator adds the setters
        batching.set_max_batch_size(config.text_encoder.max_batch)
        batching.set_batch_wait_timeout_s(config.text_encoder.batch_wait_s)

    async def encode(self, text: str, model: str, session_id: str = "") -> Encoded | Failure:
        """Return a text's embedding, or why there is none.

        Args:
            text: The prompt.
            model: Key of the gateway's model; another one's text encoder refuses.
            session_id: Whose prompt it is, for the log.
        """
        logs.bind(session_id=session_id)
        refused = refusal(model, self._model)
        if refused is not None:
            return refused
        encoded = await self.encode_batch(text)
        return failure_of(encoded) if isinstance(encoded, Exception) else Encoded(encoded, self._process)

    async def check_health(self) -> None:
        """Raise after a device fault, so that Serve replaces this replica."""
        self._warden.require_healthy()

    @serve.batch
    async def encode_batch(self, texts: list[str]) -> list[PackedEmbedding | Exception]:
        """Return one embedding per text; Serve calls it with the texts of several callers."""
        return await self.encode_all(texts)

    async def encode_all(self, texts: list[str]) -> list[PackedEmbedding | Exception]:
        """Return one embedding per text, or why there is none."""
        start = time.perf_counter()
        try:
            encoded = await self._warden.run(lambda: self._encode_all(texts))
        except DEVICE_FAULTS as error:
            return [error] * len(texts)
        self._recorder.text_batch(len(texts), time.perf_counter() - start)
        self._recorder.cache("text", self._engine.cached_bytes)
        return encoded

    def _encode_all(self, texts: Sequence[str]) -> list[PackedEmbedding | Exception]:
        """Encode a batch; a text that cannot be encoded fails alone."""
        try:
            return list(self._engine.encode(texts))
        except DEVICE_FAULTS:
            raise
        except Exception as error:  # noqa: BLE001  (Serve would log its text, which may hold a prompt)
            if len(texts) == 1:
                return [error]
            return [self._encode_all([text])[0] for text in texts]
