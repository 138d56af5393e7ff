"""One client's session in the gateway: everything that is durable of it passes through here.

Four tasks share its life. `_read` takes the client's messages; `_feed` has the start image and the prompts encoded and
handed on; `_stream` waits for a generator, takes its chunks and has them delivered; `_watch` keeps the time. The first
of them to finish decides how the session ends, and `_release` gives everything back, however it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from causal_forcing.errors import CausalForcingError
from causal_forcing.prompts import PromptUpdate
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.access.guard import Guard, OpenGuard
from serve.access.usage import Spent
from serve.admission.claims import claim
from serve.config import ServiceConfig
from serve.detached import detached
from serve.errors import Unavailable
from serve.logs import LOGGER, bind, bound
from serve.messages import (
    Credit,
    EncodeImage,
    GeneratedChunk,
    LeaseEvent,
    LeaseRequest,
    LeaseStarted,
    Progress,
    SetPaused,
    StartFrom,
    Stop,
)
from serve.session_request import SessionRequest
from serve.status import FailedElsewhere, failure_of

from .backends import Backends
from .control_line import ControlLine
from .decoding import DecoderLink
from .delivery import Delivery
from .inputs import Input
from .memory import SessionMemory
from .moves import GeneratorLost, Moves, chunks_of
from .outbox import Outbox
from .patience import Patience
from .prompt_feed import PromptFeed
from .protocol import ClientEvent
from .session_meter import SessionMeter

LEASE_S = 8.0
"""How long a granted generator may take to begin; then the session goes back to its place in the queue."""

STOP_S = 3.0
"""How long a generator may take to end a lease that was told to stop; then the call is cancelled."""


class LiveSession:
    """Drives one call from its first message to its last."""

    def __init__(
        self,
        session_id: str,
        service: ServiceConfig,
        backends: Backends,
        client: Input,
        guard: Guard | None = None,
        *,
        meter: SessionMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._guard = guard or OpenGuard()
        self._meter = meter or SessionMeter()
        self._spent = Spent()
        self._session_id = session_id
        self._service = service
        self._limits = service.limits
        self._backends = backends
        self._client = client
        self._outbox = Outbox()
        self._clock = clock
        self._patience = Patience(service.limits, clock=clock)
        self._line = ControlLine(backends, session_id)
        self._feed = PromptFeed(
            backends,
            self._line,
            service.limits.max_pending_prompts,
            check=self._guard.check,
            refuse=self._outbox.prompt_refused,
            spent=self._spent,
        )
        self._moves = Moves(service.limits)
        self._memory: SessionMemory | None = None
        self._is_ending = self._has_generator = False
        self._ended_by: CausalForcingError | None = None
        self._driver: asyncio.Task[None] | None = None
        self._streaming: asyncio.Task[pb.EndReason] | None = None
        self._link: DecoderLink | None = None
        self._delivery: Delivery | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the session's latents and unsent messages take in this process."""
        return self._outbox.nbytes + (self._memory.nbytes if self._memory is not None else 0)

    def progress(self) -> Progress:
        """Return what the session has had so far."""
        outbox, patience = self._outbox, self._patience
        return Progress(
            is_paused=patience.is_paused,
            chunk_count=outbox.chunk_count,
            frame_count=outbox.frame_count,
            byte_count=outbox.byte_count,
            dropped_frame_count=outbox.dropped_frame_count,
            held_s=patience.duration_s,
            memory_bytes=self.nbytes,
            **asdict(self._spent),
        )

    def end(self, error: CausalForcingError) -> None:
        """End the session with an error that has its reason outside of it; without effect when it is ending."""
        if self._driver is not None and not self._is_ending:
            self._ended_by = error
            self._driver.cancel()

    async def messages(self) -> AsyncGenerator[pb.StreamVideoResponse]:
        """Yield what the client is told; the last message is SessionEnded or Error. Closing it ends the session."""
        driver = self._driver = detached(self._drive(bound()))
        try:
            async for message in self._outbox:
                yield message
        finally:
            if not self._is_ending:  # otherwise it is giving everything back, which must not be interrupted
                driver.cancel()
            await asyncio.wait([driver])
            self._outbox.discard()

    async def _drive(self, log_fields: Mapping[str, str]) -> None:
        bind(**log_fields)  # this task is detached, and so are its context's variables
        try:
            reason = await self._run()
            self._outbox.ended(reason, self._patience.duration_s)
        except Exception as error:  # noqa: BLE001  (the gRPC boundary: every error becomes a message)
            self._outbox.failed(failure_of(error))
        except asyncio.CancelledError:
            if self._ended_by is None:
                raise
            self._outbox.failed(failure_of(self._ended_by))
        finally:
            self._is_ending = True
            try:
                await self._release()
            finally:
                self._outbox.close()
                if self._memory is not None:
                    self._memory.clear()

    async def _run(self) -> pb.EndReason:
        """Return why the session ended well, or raise why it did not."""
        request = await self._client.request()
        await self._guard.admit(request)
        self._patience = Patience(self._limits, expects_messages=request.goal is None, clock=self._clock)
        self._memory = SessionMemory(request.config)
        self._link = DecoderLink(self._backends, self._session_id, self._memory, request.format)
        self._delivery = Delivery(request, self._link, self._feed, self._outbox, spent=self._spent, meter=self._meter)
        self._feed.submit(request.prompt, is_checked=True)
        self._streaming = asyncio.create_task(self._stream(request, self._delivery, self._memory))
        work = (self._read(request, self._delivery), self._hand_on(request), self._watch())
        helpers = [asyncio.create_task(coroutine) for coroutine in work]
        try:
            done, _ = await asyncio.wait([self._streaming, *helpers], return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            await _cancel_all(helpers)
            await self._feed.close()

    async def _read(self, request: SessionRequest, delivery: Delivery) -> pb.EndReason:
        """Take the client's messages until it ends; the end of its stream is the reliable sign that it is gone."""
        async for event in self._client.events():
            self._patience.heard()
            await self._hear(event, request, delivery)
        return pb.END_REASON_CLIENT

    async def _hear(self, event: ClientEvent | None, request: SessionRequest, delivery: Delivery) -> None:
        match event:
            case PromptUpdate():
                self._feed.submit(event)
            case Credit():
                delivery.acked(event.acked_chunk)
                self._patience.credit(left=delivery.has_credit)
                if not request.gives_itself_credit:
                    await self._line.put(event)
            case pb.Ping():
                self._outbox.pong(event)
            case pb.Pause():
                self._patience.pause()
                await self._line.put(SetPaused(True))
            case pb.Resume():
                self._patience.resume()
                await self._line.put(SetPaused(False))
            case pb.RequestKeyframe():
                delivery.request_keyframe()

    async def _hand_on(self, request: SessionRequest) -> pb.EndReason:
        """Have the start image and the prompts encoded, and hand them to the generator."""
        if request.start_image:
            size = (request.config.height, request.config.width)
            image = EncodeImage(request.start_image, *size, session_id=self._session_id)
            await self._line.put(StartFrom(await self._backends.encode_image(image)))
        await self._feed.run()

    async def _stream(self, request: SessionRequest, delivery: Delivery, memory: SessionMemory) -> pb.EndReason:
        """Have generators make the session's chunks, one after another, until one of them ends it as asked."""
        while True:
            lease, replica_id = await self._obtain_lease(request, memory)
            self._has_generator = True
            try:
                self._tell_of_generator(request, memory)
                async with contextlib.aclosing(chunks_of(lease)) as chunks:
                    async for chunk in chunks:
                        if not (self._is_ending or delivery.is_complete):
                            self._commit(chunk, memory)
                            await self._deliver(chunk, request, delivery)
            except GeneratorLost as lost:
                if not (self._is_ending or delivery.is_complete):
                    await self._move(lost, replica_id, memory)
                    continue
            finally:
                self._has_generator = False
                await lease.aclose()
            return pb.END_REASON_COMPLETE if delivery.is_complete else pb.END_REASON_CLIENT

    async def _move(self, lost: GeneratorLost, replica_id: str, memory: SessionMemory) -> None:
        """Give up a generator and ask for another one; raises if the session ends instead."""
        LOGGER.warning("the session has lost generator %s before chunk %d: %s", replica_id, memory.next_chunk, lost)
        try:
            self._moves.begin(lost, memory.next_chunk)
        except FailedElsewhere:
            await self._backends.admission.retire(replica_id)
            raise
        await self._backends.admission.requeue(self._session_id, replica_id)

    def _tell_of_generator(self, request: SessionRequest, memory: SessionMemory) -> None:
        moved = self._moves.end()
        if moved is not None:
            self._outbox.moved(memory.next_chunk, *moved)
        else:
            self._patience.started()
            self._outbox.started(self._session_id, request, self._service)

    def _commit(self, chunk: GeneratedChunk, memory: SessionMemory) -> None:
        """Make a chunk part of the session, wherever that goes on from here."""
        if chunk.prompt_applied:
            memory.show(chunk.index, *self._line.shown(len(chunk.superseded)))
        memory.commit(chunk)

    async def _obtain_lease(
        self, request: SessionRequest, memory: SessionMemory
    ) -> tuple[AsyncGenerator[LeaseEvent], str]:
        """Return a lease that has begun, and the replica that it runs on."""
        try:
            async with asyncio.timeout(self._moves.wait_s) as limit:
                return await self._wait_for_lease(request, memory)
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._moves.give_up() from None

    async def _wait_for_lease(
        self, request: SessionRequest, memory: SessionMemory
    ) -> tuple[AsyncGenerator[LeaseEvent], str]:
        waiting_since = time.monotonic()
        wanted = claim(self._session_id, request, self._guard.share, self._service)
        async with contextlib.aclosing(self._backends.admission.places(wanted)) as places:
            async for place in places:
                if not place.replica_id or not self._outbox.sent:
                    self._outbox.place(place, time.monotonic() - waiting_since)
                if not place.replica_id:
                    continue
                log_id = await self._line.open()
                lease = self._backends.lease(self._lease_request(request, place.replica_id, log_id, memory))
                began = await _begin(lease)
                if isinstance(began, LeaseStarted):
                    await self._backends.admission.confirm(self._session_id, began.replica_id)
                    return lease, began.replica_id
                await self._backends.admission.refuse(self._session_id, place.replica_id, gone=began is not None)
        raise Unavailable("admission let the session go", reason="ADMISSION_LOST")

    def _lease_request(
        self, request: SessionRequest, replica_id: str, log_id: str, memory: SessionMemory
    ) -> LeaseRequest:
        limits = self._limits
        return LeaseRequest(
            replica_id=replica_id,
            session_id=self._session_id,
            config=request.config,
            credit_chunks=request.credit_chunks,
            mailbox=self._backends.mailbox,
            idle_timeout_s=limits.stall_timeout_s + limits.silence_timeout_s + limits.pause_timeout_s,
            log_id=log_id,
            resume=memory.resume(),
            frames_per_second=request.frames_per_second if request.is_paced else None,
            lead_s=self._service.pacing.lead_s,
        )

    async def _deliver(self, chunk: GeneratedChunk, request: SessionRequest, delivery: Delivery) -> None:
        """Have a chunk decoded and sent, and let the generator go on if the client does not decide that."""
        await delivery.deliver(chunk)
        if self._is_ending:
            return
        self._client.sent(delivery.last_sent)
        self._patience.made_chunk()
        self._patience.credit(left=delivery.has_credit)
        if delivery.is_complete:
            await self._line.put(Stop())
        elif request.gives_itself_credit:
            await self._line.put(Credit(chunk.index))

    async def _watch(self) -> pb.EndReason:
        """Return when the session has lasted long enough; raise when its client has gone or does not keep up."""
        while (reason := self._patience.verdict()) is None:
            remaining_s = self._patience.warning_s()
            if remaining_s is not None:
                self._outbox.ending(remaining_s)
            await self._patience.watch()
        return reason

    async def _release(self) -> None:
        """Give everything back: the generator, the place in the queue, the decoder's cache, the mailbox."""
        if self._streaming is not None:
            if self._has_generator:
                await self._stop_generator(self._streaming)
            await _cancel_all([self._streaming])
            await self._backends.admission.leave(self._session_id)
            await self._line.close()
        if self._link is not None:
            await self._link.close()

    async def _stop_generator(self, streaming: asyncio.Task[pb.EndReason]) -> None:
        """Tell the generator to stop, and wait until it has; a cancel alone is sometimes lost."""
        try:
            await self._line.put(Stop())
        except Unavailable:
            return  # its mailbox is gone, which it notices by itself
        await asyncio.wait([streaming], timeout=STOP_S)


async def _cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended, whatever they end with."""
    cancelled = [task for task in tasks if task.cancel() or task.done()]
    await asyncio.gather(*cancelled, return_exceptions=True)


async def _begin(lease: AsyncGenerator[LeaseEvent]) -> LeaseEvent | Unavailable | None:
    """Return a lease's first event, or why there is none: its generator is gone, or None if it takes too long.

    Unless the lease has started, it is closed.
    """
    began: LeaseEvent | Unavailable | None = None
    try:
        async with asyncio.timeout(LEASE_S):
            began = await anext(lease)
    except TimeoutError:
        pass
    except Unavailable as error:
        began = error
    finally:
        if not isinstance(began, LeaseStarted):
            await lease.aclose()
    return began
