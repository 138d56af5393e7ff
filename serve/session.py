"""One client's session in the gateway: everything that is durable of it passes through here.

Four tasks share its life. `_read` takes the client's messages; `_feed_prompts` turns prompts into embeddings, in order;
`_stream` waits for a generator, takes its chunks, has them decoded and sends the frames; `_watch` keeps the time. The
first of them to finish decides how the session ends, and `_release` gives everything back, however it ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

from ray.exceptions import RayActorError

from causal_forcing.errors import NoCapacity
from causal_forcing.prompts import PromptUpdate
from protos.causal_forcing.v1 import video_pb2 as pb

from .backends import Backends
from .claims import claim
from .config import ServiceConfig
from .decoding import DecoderLink
from .detached import detached
from .errors import ClientGone, Unavailable
from .messages import (
    Credit,
    EmbeddingWindow,
    GeneratedChunk,
    LeaseEnded,
    LeaseEvent,
    LeaseRequest,
    LeaseStarted,
    PackedEmbedding,
    Share,
    Stop,
)
from .outbox import Outbox
from .protocol import Conversation
from .requests import SessionRequest
from .status import FailedElsewhere, failure_of

LEASE_S = 8.0
"""How long a granted generator may take to begin; then the session goes back to its place in the queue."""

STOP_S = 3.0
"""How long a generator may take to end a lease that was told to stop; then the call is cancelled."""


class LiveSession:
    """Drives one StreamVideo call from its first message to its last."""

    def __init__(
        self,
        session_id: str,
        service: ServiceConfig,
        backends: Backends,
        requests: AsyncIterator[pb.StreamVideoRequest],
    ) -> None:
        self._session_id = session_id
        self._service = service
        self._limits = service.limits
        self._backends = backends
        self._requests = requests
        self._outbox = Outbox()
        self._conversation = Conversation(service)
        self._prompts: asyncio.Queue[tuple[PromptUpdate, asyncio.Task[list[PackedEmbedding]]]] = asyncio.Queue()
        self._unapplied_prompts = 0
        self._acked_chunk = -1
        self._heard_s = time.monotonic()
        self._started_s: float | None = None
        self._starved_s: float | None = None
        self._is_ending = False
        self._streaming: asyncio.Task[pb.EndReason] | None = None
        self._link: DecoderLink | None = None

    async def messages(self) -> AsyncGenerator[pb.StreamVideoResponse]:
        """Yield what the client is told; the last message is SessionEnded or Error. Closing it ends the session."""
        driver = detached(self._drive())
        try:
            async for message in self._outbox:
                yield message
        finally:
            if not self._is_ending:  # otherwise it is giving everything back, which must not be interrupted
                driver.cancel()
            await asyncio.wait([driver])

    async def _drive(self) -> None:
        try:
            reason = await self._run()
            self._is_ending = True
            self._outbox.ended(reason, time.monotonic() - (self._started_s or time.monotonic()))
        except Exception as error:  # noqa: BLE001  (the gRPC boundary: every error becomes a message)
            self._is_ending = True
            self._outbox.failed(failure_of(error))
        finally:
            self._is_ending = True
            try:
                await self._release()
            finally:
                self._outbox.close()

    async def _run(self) -> pb.EndReason:
        """Return why the session ended well, or raise why it did not."""
        request = await self._receive_config()
        await self._backends.open_mailbox(self._session_id)
        size = (request.config.height, request.config.width)
        self._link = DecoderLink(self._backends, self._session_id, size, request.format)
        self._submit(request.prompt)
        self._streaming = asyncio.create_task(self._stream(request))
        helpers = [asyncio.create_task(work) for work in (self._read(), self._feed_prompts(), self._watch(request))]
        try:
            done, _ = await asyncio.wait([self._streaming, *helpers], return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            await _cancel_all(helpers)
            await _cancel_all(self._prompts.get_nowait()[1] for _ in range(self._prompts.qsize()))

    async def _receive_config(self) -> SessionRequest:
        limit_s = self._limits.config_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                async for message in self._requests:
                    event = self._conversation.receive(message)
                    if isinstance(event, SessionRequest):
                        self._heard_s = time.monotonic()
                        return event
        except TimeoutError:
            raise ClientGone(f"no config came within {limit_s:g} s") from None
        except RayActorError:
            pass  # the proxy died, and the client's connection with it
        raise self._conversation.without_config()

    async def _read(self) -> pb.EndReason:
        """Take the client's messages until it ends; the end of its stream is the reliable sign that it is gone."""
        try:
            async for message in self._requests:
                self._heard_s = time.monotonic()
                event = self._conversation.receive(message)
                match event:
                    case PromptUpdate():
                        self._submit(event)
                    case Credit():
                        self._acked_chunk, self._starved_s = event.acked_chunk, None
                        await self._backends.put(self._session_id, event)
                    case pb.Ping():
                        self._outbox.pong(event)
                    case pb.End():
                        break
        except RayActorError:
            pass  # the proxy died, and the client's connection with it
        return pb.END_REASON_CLIENT

    def _submit(self, update: PromptUpdate) -> None:
        """Begin to encode a prompt; it goes to the generator after those before it."""
        limit = self._limits.max_pending_prompts
        if self._unapplied_prompts >= limit:
            raise NoCapacity(f"{limit} prompts wait for their first chunk", reason="TOO_MANY_PROMPTS")
        self._unapplied_prompts += 1
        self._prompts.put_nowait((update, asyncio.create_task(self._encode(update))))

    async def _encode(self, update: PromptUpdate) -> list[PackedEmbedding]:
        return list(await asyncio.gather(*(self._backends.encode(prompt.text) for prompt in update.prompts)))

    async def _feed_prompts(self) -> pb.EndReason:
        window = EmbeddingWindow()
        while True:
            update, encoding = await self._prompts.get()
            await self._backends.put(self._session_id, window.compose(update, await encoding))

    async def _stream(self, request: SessionRequest) -> pb.EndReason:
        """Wait for a generator and send its chunks until it stops."""
        lease, replica_id = await self._obtain_lease(request)
        try:
            self._started_s = time.monotonic()
            self._outbox.started(self._session_id, request, self._service)
            async for event in lease:
                match event:
                    case GeneratedChunk() if not self._is_ending:
                        await self._deliver(event, request)
                    case LeaseEnded(None):
                        return pb.END_REASON_CLIENT
                    case LeaseEnded(failure) if failure is not None:
                        raise FailedElsewhere(failure)
            raise Unavailable("the generator ended without a word")
        except Unavailable:
            await self._backends.retire(replica_id)
            raise
        finally:
            await lease.aclose()

    async def _obtain_lease(self, request: SessionRequest) -> tuple[AsyncGenerator[LeaseEvent], str]:
        """Return a lease that has begun, and the replica that it runs on."""
        waiting_since = time.monotonic()
        async for place in self._backends.places(claim(self._session_id, request, Share(), self._service)):
            if not place.replica_id or not self._outbox.sent:
                self._outbox.place(place, time.monotonic() - waiting_since)
            if not place.replica_id:
                continue
            lease = self._backends.lease(self._lease_request(request, place.replica_id))
            try:
                async with asyncio.timeout(LEASE_S):
                    began = await anext(lease)
            except (TimeoutError, Unavailable) as error:
                await lease.aclose()
                await self._backends.refuse(self._session_id, place.replica_id, gone=isinstance(error, Unavailable))
                continue
            assert isinstance(began, LeaseStarted)
            await self._backends.confirm(self._session_id, began.replica_id)
            return lease, began.replica_id
        raise Unavailable("admission let the session go", reason="ADMISSION_LOST")

    def _lease_request(self, request: SessionRequest, replica_id: str) -> LeaseRequest:
        return LeaseRequest(
            replica_id=replica_id,
            session_id=self._session_id,
            config=request.config,
            credit_chunks=request.credit_chunks,
            mailbox=self._backends.mailbox,
            idle_timeout_s=self._limits.stall_timeout_s + self._limits.silence_timeout_s,
        )

    async def _deliver(self, chunk: GeneratedChunk, request: SessionRequest) -> None:
        """Have a chunk decoded and send it."""
        assert self._link is not None
        decoded = await self._link.decode(chunk)
        if self._is_ending:
            return
        if chunk.prompt_applied:
            self._unapplied_prompts -= 1 + len(chunk.superseded)
        self._conversation.sent_chunk = chunk.index
        self._outbox.chunk(chunk, decoded)
        if chunk.index - self._acked_chunk >= request.credit_chunks:
            self._starved_s = time.monotonic()

    async def _watch(self, request: SessionRequest) -> pb.EndReason:
        """Return when the session has lasted long enough; raise when its client has gone or does not keep up."""
        limits = self._limits
        while True:
            silence_left_s = limits.silence_timeout_s - _age(self._heard_s)
            stall_left_s = limits.stall_timeout_s - _age(self._starved_s)
            life_left_s = limits.max_session_s - _age(self._started_s)
            if silence_left_s <= 0:
                raise ClientGone(f"nothing came from the client for {limits.silence_timeout_s:g} s")
            if stall_left_s <= 0:
                waited = f"{request.credit_chunks} chunks have waited {limits.stall_timeout_s:g} s for an ack"
                raise ClientGone(waited, reason="CLIENT_TOO_SLOW")
            if life_left_s <= 0:
                return pb.END_REASON_MAX_DURATION
            await asyncio.sleep(min(silence_left_s, stall_left_s, life_left_s))

    async def _release(self) -> None:
        """Give everything back: the generator, the place in the queue, the decoder's cache, the mailbox."""
        if self._streaming is not None:
            if self._started_s is not None and not self._streaming.done():
                await self._stop_generator(self._streaming)
            await _cancel_all([self._streaming])
            await self._backends.leave(self._session_id)
            await self._backends.close_mailbox(self._session_id)
        if self._link is not None:
            await self._link.close()

    async def _stop_generator(self, streaming: asyncio.Task[pb.EndReason]) -> None:
        """Tell the generator to stop, and wait until it has; a cancel alone is sometimes lost."""
        try:
            await self._backends.put(self._session_id, Stop())
        except Unavailable:
            return  # its mailbox is gone, which it notices by itself
        await asyncio.wait([streaming], timeout=STOP_S)


def _age(since_s: float | None) -> float:
    """Return the seconds since a point in time; none for one that has not come."""
    return 0.0 if since_s is None else time.monotonic() - since_s


async def _cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended, whatever they end with."""
    cancelled = [task for task in tasks if task.cancel() or task.done()]
    await asyncio.gather(*cancelled, return_exceptions=True)
