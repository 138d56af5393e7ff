"""The VAE decoder deployment: latents to encoded frames, for several sessions at a time.

Each session's temporal cache is here or it is not; nothing depends on it. A call says which chunk it is: the chunk
that the cache expects is decoded, the one before is answered again, and any other is answered with NEED_PRIME, upon
which the gateway sends the latents before it and the cache is made anew, exactly. Caches not used for longest are
given up first.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import ray
from ray import serve

from . import logs
from .admission.succession import refusal
from .codecs.frames import EncodedFrame, FrameEncoder, Pixels, new_encoder
from .codecs.images import read_start_image
from .config import ServiceConfig
from .device import Warden
from .engines import DecoderEngine, DecoderStream, load_decoder
from .messages import CloseDecoder, Decoded, DecodeRequest, EncodeImage, PackedTensor, Process
from .metrics import SILENT, Recorder, Role
from .metrics.process import replica_recorder, watch_replica
from .status import Failure, failure_of

IDLE_S = 300.0
"""A cache that was not used for this long belongs to a session whose end was lost."""

MAX_PRIMING = 2
"""Sessions whose caches are made anew at a time, so that a running session waits for few of their frames."""

T = TypeVar("T")


@dataclass
class Entry:
    """One session's temporal cache.

    Attributes:
        stream: The decoder's state.
        next_chunk: The chunk it expects; None while it is being changed, or after that failed.
        last: The answer to the chunk before.
        encoder: What turns its frames into bytes; a fresh one begins with a keyframe.
        used_s: When it was last used.
        lock: Held by the call that uses it.
    """

    stream: DecoderStream
    next_chunk: int | None = None
    last: Decoded | None = None
    encoder: FrameEncoder | None = None
    used_s: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        frames = self.last.frames if self.last is not None else None
        encoder_bytes = self.encoder.nbytes if self.encoder is not None else 0
        return self.stream.nbytes + encoder_bytes + sum(len(frame.data) for frame in frames or ())


class DecoderCache:
    """The entries of many sessions within a limit of bytes.

    Attributes:
        evictions: Entries given up so far.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.evictions = 0
        self._limit_bytes = limit_bytes
        self._entries: dict[str, Entry] = {}

    def find(self, session_id: str, now_s: float) -> Entry | None:
        """Return the session's entry, if it has one, and mark it as used."""
        entry = self._entries.pop(session_id, None)
        if entry is not None:
            entry.used_s = now_s
            self._entries[session_id] = entry  # the last one is the last used
        return entry

    def add(self, session_id: str, stream: DecoderStream, now_s: float) -> Entry:
        """Return a new entry for a session, and give up others if that is too much."""
        entry = self._entries[session_id] = Entry(stream, used_s=now_s)
        self.fit(entry, now_s)
        return entry

    def drop(self, session_id: str) -> None:
        """Forget a session."""
        self._entries.pop(session_id, None)

    @property
    def nbytes(self) -> int:
        """Memory of all entries."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def fit(self, keep: Entry, now_s: float) -> None:
        """Give up the entries that were not used for longest until the rest fits; ``keep`` may have grown."""
        excess = self.nbytes - self._limit_bytes
        for session_id, entry in list(self._entries.items()):
            old = now_s - entry.used_s > IDLE_S
            if entry is keep or entry.lock.locked() or not (excess > 0 or old):
                continue
            excess -= entry.nbytes
            del self._entries[session_id]
            self.evictions += 1


@dataclass
class DecodeCounts:
    """What a decoder was asked for so far.

    Attributes:
        decoded: Chunks decoded.
        repeated: Chunks that were asked for again and answered from memory.
        missed: Chunks whose session's cache was not here.
        primed: Caches made anew from latents.
    """

    decoded: int = 0
    repeated: int = 0
    missed: int = 0
    primed: int = 0


class DecoderService:
    """Decodes and encodes for many sessions, on one thread each."""

    def __init__(
        self, engine: DecoderEngine, replica_id: str, cache_bytes: int, warden: Warden, recorder: Recorder = SILENT
    ) -> None:
        self._recorder = recorder
        self._engine = engine
        self._replica_id = replica_id
        self._device = warden
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._priming = asyncio.Semaphore(MAX_PRIMING)
        self.cache = DecoderCache(cache_bytes)
        self.counts = DecodeCounts()
        recorder.cache_limit("decoder", cache_bytes)

    async def decode(self, request: DecodeRequest) -> Decoded:
        """Return a chunk's encoded frames, or NEED_PRIME.

        Raises:
            DeviceFault: If the device failed; likewise ``OutOfMemory`` and ``NonFiniteOutput``, so that a picture that
                is not made of numbers is never shown.
        """
        entry = self.cache.find(request.session_id, time.monotonic())
        if entry is None:
            stream = await self._device.run(lambda: self._engine.open(request.height, request.width))
            entry = self.cache.add(request.session_id, stream, time.monotonic())
        async with entry.lock:
            if entry.last is not None and entry.next_chunk == request.chunk_index + 1:
                self.counts.repeated += 1
                return entry.last
            ready = request.starts_scene or entry.next_chunk == request.chunk_index
            if not ready and request.history is None:
                self.counts.missed += 1
                return Decoded(self._replica_id, None)
            entry.next_chunk = None  # until this has succeeded; a call may be cancelled at every await
            encoder, entry.encoder = entry.encoder if ready else None, None
            prime_s = 0.0
            if request.starts_scene:
                await self._device.run(entry.stream.reset)
            elif not ready and request.history is not None:
                prime_s = await self._prime(entry.stream, request.history, (request.height, request.width))
            if encoder is None:
                encoder = new_encoder(request.format, request.height, request.width, self._engine.min_frame_bytes)
            answer = await self._frames(entry.stream, encoder, request)
            entry.last, entry.encoder = replace(answer, prime_s=prime_s), encoder
            entry.next_chunk = request.chunk_index + 1
            self.counts.decoded += 1
            self.cache.fit(entry, time.monotonic())
            return entry.last

    async def encode_image(self, request: EncodeImage) -> PackedTensor:
        """Return the latents of a start image.

        Raises:
            InvalidRequest: If the file is damaged (field ``start_image``).
        """
        frame = await _run(self._encoder, lambda: read_start_image(request.data, request.height, request.width))
        return await self._device.run(lambda: self._engine.encode_image(frame))

    def look(self, _elapsed_s: float = 0.0) -> None:
        """Record what the cache holds, and what was asked of it."""
        self._recorder.decoder_cache(len(self.cache), self.cache.nbytes)
        counts = self.counts
        self._recorder.decoder_totals(
            decoded=counts.decoded, repeated=counts.repeated, missed=counts.missed, evicted=self.cache.evictions
        )

    async def _prime(self, stream: DecoderStream, history: PackedTensor, size: tuple[int, int]) -> float:
        """Make the cache anew from the latents before the chunk, a frame at a time between other sessions' work."""
        start = time.perf_counter()
        async with self._priming:
            await self._device.run(stream.reset)
            for frame in range(history.frames):
                latents = history.frame_slice(frame, frame + 1)
                await self._device.run(lambda latents=latents: stream.decode(latents), ("prime", *size))  # type: ignore[misc]
        self.counts.primed += 1
        prime_s = time.perf_counter() - start
        self._recorder.primed(prime_s)
        return prime_s

    async def _frames(self, stream: DecoderStream, encoder: FrameEncoder, request: DecodeRequest) -> Decoded:
        def decode() -> tuple[Sequence[Pixels], float]:
            start = time.perf_counter()
            return stream.decode(request.latents), time.perf_counter() - start

        def encode() -> tuple[tuple[EncodedFrame, ...], float]:
            start = time.perf_counter()
            return encode_all(encoder, pixels, request), time.perf_counter() - start

        pixels, decode_s = await self._device.run(decode, ("decode", request.height, request.width))
        self._recorder.stage("decode", decode_s)
        if not request.encode:
            return Decoded(self._replica_id, (), decode_s)
        frames, encode_s = await _run(self._encoder, encode)
        self._recorder.stage("encode", encode_s)
        return Decoded(self._replica_id, frames, decode_s, encode_s)


class VaeDecoder:
    """A Serve replica that holds the VAE."""

    async def __init__(self, config: ServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.set_up(config.logs)
        device = ThreadPoolExecutor(1, thread_name_prefix="device")
        recorder = replica_recorder(Role.DECODER)
        engine = await asyncio.get_running_loop().run_in_executor(device, load_decoder, config, recorder)
        replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._model = config.model_key
        self._process = Process(replica_id, os.getpid(), ray.get_runtime_context().get_node_id())
        self._warden = Warden(device, config.vae_decoder.first_step_timeout_s, recorder.device_fault)
        self._service = DecoderService(engine, replica_id, config.vae_decoder.cache_bytes, self._warden, recorder)
        watch_replica(recorder, config, Role.DECODER, self._service.look)

    async def decode(self, request: DecodeRequest) -> Decoded | Failure:
        """Return a chunk's encoded frames, or NEED_PRIME, or why there are none."""
        logs.bind(session_id=request.session_id)
        refused = refusal(request.model, self._model)
        if refused is not None:
            return refused
        try:
            return replace(await self._service.decode(request), process=self._process)
        except Exception as error:  # noqa: BLE001  (the gateway is told, and the log has the session)
            return failure_of(error)

    async def encode_image(self, request: EncodeImage) -> PackedTensor | Failure:
        """Return the latents of a start image, or why there are none."""
        logs.bind(session_id=request.session_id)
        try:
            return refusal(request.model, self._model) or await self._service.encode_image(request)
        except Exception as error:  # noqa: BLE001  (the gateway is told, and the log has the session)
            return failure_of(error)

    async def check_health(self) -> None:
        """Raise after a device fault, so that Serve replaces this replica."""
        self._warden.require_healthy()

    async def close(self, request: CloseDecoder) -> None:
        """Forget a session."""
        self._service.cache.drop(request.session_id)

    async def holdings(self) -> dict[str, int]:
        """Return what this process keeps for sessions: all zero, but for its own tasks, when there are none."""
        cache = self._service.cache
        return {"caches": len(cache), "cache_bytes": cache.nbytes, "tasks": len(asyncio.all_tasks())}


def encode_all(encoder: FrameEncoder, pixels: Sequence[Pixels], request: DecodeRequest) -> tuple[EncodedFrame, ...]:
    """Return a chunk's frames encoded; a scene begins with a frame that can be decoded by itself."""
    keyframe = request.keyframe or request.starts_scene
    return tuple(
        encoder.encode(frame, request.first_frame + number, keyframe=keyframe and number == 0)
        for number, frame in enumerate(pixels)
    )


async def _run(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Run work on a thread; a cancelled caller leaves, the work goes on before whatever comes next."""
    return await asyncio.shield(asyncio.get_running_loop().run_in_executor(pool, work))
