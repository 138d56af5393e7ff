"""The generator deployment: one long streaming call is one session's lease.

The event loop reads the mailbox and yields chunks; the device works on one thread of its own, so a step that is under
way when a session ends delays the next session's first step and nothing else. Control takes effect between steps (stop)
or between chunks (prompts, credit).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError

from causal_forcing.errors import DeviceFault, SessionStateError

from .admission.actor import connect
from .admission.budget import session_budget
from .admission.reporter import Reporter
from .admission.succession import refusal
from .config import ServiceConfig
from .detached import detached
from .device import DEVICE_FAULTS, StepClock, end_process, run_within
from .engines import GeneratorEngine, GeneratorSession, load_generator
from .errors import Unavailable
from .logs import LOGGER, bind, set_up
from .messages import (
    Control,
    Credit,
    EmbeddingWindow,
    GeneratedChunk,
    LeaseEnded,
    LeaseEvent,
    LeaseRequest,
    LeaseStarted,
    PackedEmbedding,
    PackedTensor,
    SetPaused,
    SetPrompt,
    StartFrom,
    Stop,
)
from .metrics import Role
from .metrics.generator import GeneratorMeter
from .metrics.process import replica_recorder, watch_replica
from .pace import Pace
from .status import failure_of

POLL_S = 2.0
"""How long one poll of the mailbox waits; the next one also says that this process is not frozen."""

FAULT_EXIT_S = 10.0
"""After a device fault Serve stops this replica; if it is still there after this long, its device's thread hangs or
other sessions hold it, and the process ends itself. Serve starts another one, and the sessions move."""

T = TypeVar("T")


class SessionReporter(Protocol):
    """Tells admission which sessions are here."""

    async def add(self, session_id: str) -> None:
        """Report a new session."""
        ...

    async def remove(self, session_id: str) -> None:
        """Report that a session is over."""
        ...

    async def close(self) -> None:
        """Report that no session can come here any more."""
        ...


class Controls:
    """What the mailbox has said and the generator has not done yet.

    Attributes:
        acked_chunk: Highest chunk the client is finished with.
        is_paused: Whether the session rests.
        start_latents: Of the image that the video starts from; None for none.
        stop: Set when the lease shall end; asked between two steps, from the device's thread.
        error: Why nothing more can come, if so.
    """

    def __init__(self) -> None:
        self.acked_chunk = -1
        self.is_paused = False
        self.start_latents: PackedTensor | None = None
        self.stop = threading.Event()
        self.error: Exception | None = None
        self._window = EmbeddingWindow()
        self._prompt: tuple[SetPrompt, tuple[PackedEmbedding, ...]] | None = None
        self._superseded: list[str] = []
        self._prompt_lock = threading.Lock()
        self._has_rested = False
        self._news = asyncio.Event()

    def apply(self, message: Control) -> None:
        """Take in one message; the device's thread may take a prompt meanwhile."""
        match message:
            case SetPrompt():
                embeddings = self._window.admit(message)
                with self._prompt_lock:
                    if self._prompt is not None:
                        self._superseded.append(self._prompt[0].update.prompt_id)
                    self._prompt = (message, embeddings)
            case Credit(acked_chunk):
                self.acked_chunk = max(self.acked_chunk, acked_chunk)
            case SetPaused(paused):
                self._has_rested |= paused
                self.is_paused = paused
            case StartFrom(latents):
                self.start_latents = latents
            case Stop():
                self.stop.set()
        self._news.set()

    def fail(self, error: Exception) -> None:
        """Note that no message will come any more."""
        self.error = error
        self.stop.set()
        self._news.set()

    def take_prompt(self, session: GeneratorSession) -> tuple[str, ...]:
        """Give the newest prompt, if there is one, to the session; return the ids of those it replaced."""
        with self._prompt_lock:
            if self._prompt is None:
                return ()
            message, embeddings = self._prompt
            superseded, self._prompt, self._superseded = tuple(self._superseded), None, []
        session.update_prompt(message.update, embeddings)
        return superseded

    def take_rest(self) -> bool:
        """Return, once, whether the session has been paused."""
        rested, self._has_rested = self._has_rested, False
        return rested

    @property
    def has_prompt(self) -> bool:
        """Whether a prompt waits to be taken."""
        return self._prompt is not None

    async def wait(self, timeout_s: float) -> None:
        """Return when a message comes, or after a time."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()

    async def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return when ``ready()`` or the lease shall end.

        Raises:
            TimeoutError: If neither happens in time.
        """
        async with asyncio.timeout(timeout_s):
            while not ready() and not self.stop.is_set():
                self._news.clear()
                await self._news.wait()


class Lease:
    """One session on this replica."""

    def __init__(
        self,
        request: LeaseRequest,
        engine: GeneratorEngine,
        worker: ThreadPoolExecutor,
        first_chunk_s: float = 120.0,
        meter: GeneratorMeter | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        self._meter = meter or GeneratorMeter()
        self._request = request
        self._engine = engine
        self._worker = worker
        self._first_chunk_s = first_chunk_s
        self._compiles = compiles
        self._clock = StepClock(first_chunk_s)
        self._is_full = False
        self._controls = Controls()
        self._pace = Pace(request.frames_per_second, request.lead_s)
        self._next_chunk = request.resume.point.chunk_index if request.resume is not None else 0
        self._credit_wait_s = 0.0
        self._reader: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[GeneratorSession] | None = None
        self._job: asyncio.Task[Any] | None = None
        self.error: BaseException | None = None

    def begin(self) -> None:
        """Start to read the mailbox and to open the session; :meth:`events` goes on from there."""
        self._reader = detached(self._read())
        self._opening = detached(self._on_device(self._open))

    async def events(self) -> AsyncGenerator[LeaseEvent]:
        """Yield chunks as credit allows, then how it ended."""
        if self._opening is None:
            self.begin()
        assert self._opening is not None
        try:
            session = await asyncio.shield(self._opening)
            while (chunk := await self._generate(session)) is not None:
                yield chunk
        except Exception as error:  # noqa: BLE001  (the device loop: whatever happened, the gateway is told)
            self.error = error
            yield LeaseEnded(failure_of(error))
            return
        yield LeaseEnded()

    async def close(self) -> None:
        """Stop, and wait until the device is no longer at work for this session, or has worked for too long."""
        self._controls.stop.set()
        if self._reader is not None:
            self._reader.cancel()
        if self._opening is not None:
            await asyncio.wait([self._opening])
        if self._job is not None:
            await asyncio.wait([self._job])
            self.error = self.error or self._job.exception()

    def _open(self) -> GeneratorSession:
        request = self._request
        if request.resume is None:
            return self._engine.open(request.config)
        return self._engine.resume(request.config, request.resume)

    async def _generate(self, session: GeneratorSession) -> GeneratedChunk | None:
        """Return the next chunk, or None when the lease shall end."""
        while await self._has_credit():
            wait_s = self._pace.wait_s(time.monotonic())
            if not wait_s:
                chunk = await self._on_device(lambda: self._step(session))
                return None if chunk is None else self._measured(chunk, session)
            await self._controls.wait(wait_s)
        return None

    async def _has_credit(self) -> bool:
        """Wait until the next chunk is wanted; return False when the lease shall end."""
        controls = self._controls
        lacks_credit, asked_s = self._lacks_credit, time.monotonic()
        try:
            await controls.wait_until(self._may_generate, self._request.idle_timeout_s)
        except TimeoutError:
            raise Unavailable("the gateway has left the generator without work", reason="GATEWAY_LOST") from None
        if controls.error is not None:
            raise controls.error
        if lacks_credit:
            self._credit_wait_s += time.monotonic() - asked_s
        if controls.take_rest():
            self._pace.resume(time.monotonic())
        return not controls.stop.is_set()

    def _may_generate(self) -> bool:
        controls = self._controls
        has_prompt = self._next_chunk > 0 or controls.has_prompt
        return has_prompt and not self._lacks_credit and not controls.is_paused

    @property
    def _lacks_credit(self) -> bool:
        return self._next_chunk > self._controls.acked_chunk + self._request.credit_chunks

    def _measured(self, chunk: GeneratedChunk, session: GeneratorSession) -> GeneratedChunk:
        """Record a chunk, and return it with what the gateway is to know of its making."""
        waited_s, self._credit_wait_s = self._credit_wait_s, 0.0
        self._meter.made(chunk, self._request.session_id, session.cache_bytes)
        return replace(chunk, credit_wait_s=waited_s, made_s=time.time())

    def _step(self, session: GeneratorSession) -> GeneratedChunk | None:
        """Make one chunk on the device's thread: the start image's, if there is one, is the first."""
        controls, began_s = self._controls, time.monotonic()
        superseded = controls.take_prompt(session)
        start = time.perf_counter()
        if self._next_chunk == 0 and controls.start_latents is not None:
            chunk: GeneratedChunk | None = session.start_from(controls.start_latents)
        else:
            chunk = session.generate(controls.stop.is_set)
        if chunk is None:
            return None
        self._next_chunk += 1
        self._pace.count(chunk.frame_count, began_s)
        denoise_s = time.perf_counter() - start
        config = self._request.config
        self._is_full = sum(len(held) for held in chunk.point.held_ranges(config)) == config.cache_frames
        if self._is_full or not self._compiles:
            self._clock.took(denoise_s)
        return replace(chunk, superseded=superseded, denoise_s=denoise_s)

    @property
    def _limit_s(self) -> float:
        """How long the next step may take: one that switches prompts or fills the window may have to compile."""
        may_compile = self._compiles and (not self._is_full or self._controls.has_prompt)
        return self._first_chunk_s if may_compile else self._clock.limit_s

    async def _on_device(self, work: Callable[[], T]) -> T:
        """Run work on the device's thread; a cancelled caller leaves, the work goes on."""
        self._job = detached(run_within(self._worker, work, self._limit_s))
        with self._meter.at_work():
            result: T = await asyncio.shield(self._job)
        return result

    async def _read(self) -> None:
        """Apply messages from the mailbox until there can be no more."""
        seq = 0
        try:
            while True:
                entries = await self._request.mailbox.poll.remote(self._request.log_id, seq, POLL_S)
                for seq, message in entries:  # noqa: B007  (the last one is acknowledged by the next poll)
                    self._controls.apply(message)
        except (RayActorError, SessionStateError):
            self._controls.fail(Unavailable("the gateway of this session is gone", reason="GATEWAY_LOST"))


class GeneratorService:
    """Runs leases and says so to admission.

    As many as Serve sends: they take turns on the device's one thread. Each has at most one job there at a time, and
    the thread takes them in the order they came, so that every session gets a chunk before any gets two.
    """

    def __init__(
        self,
        engine: GeneratorEngine,
        worker: ThreadPoolExecutor,
        replica_id: str,
        reporter: SessionReporter,
        *,
        first_chunk_s: float = 120.0,
        compiles: bool = False,
        on_fault: Callable[[], None] = lambda: None,
        node_id: str = "",
        meter: GeneratorMeter | None = None,
    ) -> None:
        self._node_id = node_id
        self._engine = engine
        self._worker = worker
        self._replica_id = replica_id
        self._reporter = reporter
        self._first_chunk_s = first_chunk_s
        self._compiles = compiles
        self._on_fault = on_fault
        self._meter = meter or GeneratorMeter()
        self._fault: str | None = None

    async def lease(self, request: LeaseRequest) -> AsyncGenerator[LeaseEvent]:
        """Run one session: who serves it, its chunks, how it ended. The call is the lease."""
        bind(session_id=request.session_id)
        if self._fault is not None:
            yield LeaseEnded(failure_of(DeviceFault(f"this replica is being replaced after {self._fault}")))
            return
        lease = Lease(request, self._engine, self._worker, self._first_chunk_s, self._meter, compiles=self._compiles)
        self._meter.leased()
        try:
            lease.begin()  # while admission is told
            await self._reporter.add(request.session_id)
            yield LeaseStarted(self._replica_id, os.getpid(), self._node_id)
            async with contextlib.aclosing(lease.events()) as events:
                async for event in events:
                    if isinstance(event, LeaseEnded):
                        await self._judge(lease)  # before the gateway asks for another generator
                    yield event
        finally:
            await asyncio.shield(detached(self._end(lease, request.session_id)))  # a call may be cancelled twice

    def require_healthy(self) -> None:
        """Raise after a device fault.

        Raises:
            RuntimeError: With the fault's name.
        """
        if self._fault is not None:
            raise RuntimeError(f"the device is not to be trusted after {self._fault}")

    async def _end(self, lease: Lease, session_id: str) -> None:
        """Free the place; after a device fault there are no places until Serve has replaced this replica."""
        bind(session_id=session_id)  # this task is detached, and so are its context's variables
        await lease.close()
        self._meter.freed(session_id)
        await self._judge(lease)
        if self._fault is None:
            await self._reporter.remove(session_id)

    async def _judge(self, lease: Lease) -> None:
        """Let no more sessions come after a device fault."""
        if isinstance(lease.error, DEVICE_FAULTS) and self._fault is None:
            self._fault = type(lease.error).__name__
            self._meter.failed(lease.error.reason)
            LOGGER.error("this replica is to be replaced after %s", str(lease.error))  # a record may be kept
            self._on_fault()
            await self._reporter.close()


class Generator:
    """A Serve replica that holds the transformer."""

    async def __init__(self, config: ServiceConfig, admission: str) -> None:  # type: ignore[misc]  # Serve awaits it
        set_up(config.logs)
        worker = ThreadPoolExecutor(1, thread_name_prefix="device")
        recorder = replica_recorder(Role.GENERATOR)
        meter = GeneratorMeter(recorder)
        watch_replica(recorder, config, Role.GENERATOR, meter.look)
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(worker, load_generator, config, recorder)
        budget_bytes = await loop.run_in_executor(worker, session_budget, config)
        LOGGER.info("memory for sessions: %s bytes", budget_bytes)
        replica_id: str = serve.get_replica_context().replica_id.unique_id
        reporter = Reporter(
            connect(admission, config),
            replica_id,
            capacity=config.generator.sessions_per_replica,
            node_id=ray.get_runtime_context().get_node_id(),
            budget_bytes=budget_bytes,
        )
        reporter.start()
        self._model = config.model_key
        self._service = GeneratorService(
            engine,
            worker,
            replica_id,
            reporter,
            first_chunk_s=config.generator.first_chunk_timeout_s,
            compiles=config.generator.compile,
            meter=meter,
            on_fault=lambda: end_process(FAULT_EXIT_S),
            node_id=ray.get_runtime_context().get_node_id(),
        )

    async def lease(self, request: LeaseRequest) -> AsyncIterator[LeaseEvent]:
        """Run one session (see :meth:`GeneratorService.lease`)."""
        refused = refusal(request.model, self._model)
        if refused is not None:
            yield LeaseEnded(refused)
            return
        async with contextlib.aclosing(self._service.lease(request)) as events:
            async for event in events:
                yield event

    async def check_health(self) -> None:
        """Raise after a device fault, so that Serve replaces this replica."""
        self._service.require_healthy()
