"""The text encoder deployment: prompts of all sessions, encoded together and cached by text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from . import logs
from .config import ServiceConfig
from .engines import load_text
from .messages import PackedEmbedding
from .metrics import Place
from .metrics.process import replica_recorder, watch_replica
from .status import Failure, failure_of
from .succession import refusal


class TextEncoder:
    """A Serve replica that holds the text encoder."""

    async def __init__(self, config: ServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.set_up(config.logs)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="device")
        loop = asyncio.get_running_loop()
        self._model = config.model_key
        self._recorder = replica_recorder(Place.TEXT_ENCODER)
        self._engine = await loop.run_in_executor(self._worker, load_text, config, self._recorder)
        watch_replica(self._recorder, config, Place.TEXT_ENCODER)
        batching: Any = self.encode_batch  # Serve's decorator adds the setters
        batching.set_max_batch_size(config.text_encoder.max_batch)
        batching.set_batch_wait_timeout_s(config.text_encoder.batch_wait_s)

    async def encode(self, text: str, model: str, session_id: str = "") -> PackedEmbedding | Failure:
        """Return a text's embedding, or why there is none.

        Args:
            text: The prompt.
            model: The gateway's.
            session_id: Whose prompt it is, for the log.
        """
        logs.bind(session_id=session_id)
        refused = refusal(model, self._model)
        if refused is not None:
            return refused
        encoded = await self.encode_batch(text)
        return failure_of(encoded) if isinstance(encoded, Exception) else encoded

    @serve.batch
    async def encode_batch(self, texts: list[str]) -> list[PackedEmbedding | Exception]:
        """Return one embedding per text; Serve calls it with the texts of several callers."""
        start = time.perf_counter()
        encoded = await asyncio.get_running_loop().run_in_executor(self._worker, self._encode_all, texts)
        self._recorder.text_batch(len(texts), time.perf_counter() - start)
        self._recorder.cache("text", self._engine.cached_bytes)
        return encoded

    def _encode_all(self, texts: Sequence[str]) -> list[PackedEmbedding | Exception]:
        """Encode a batch; a text that cannot be encoded fails alone."""
        try:
            return list(self._engine.encode(texts))
        except Exception as error:  # noqa: BLE001  (Serve would log its text, which may hold a prompt)
            if len(texts) == 1:
                return [error]
            return [self._encode_all([text])[0] for text in texts]
