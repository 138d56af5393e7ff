"""The other processes as a gateway sees them: a protocol, and Ray behind it.

Everything Ray can do to a call ends here: a dead replica becomes :class:`~serve.errors.Unavailable`, and calls that may
be repeated are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.admission.desk import AdmissionDesk
from serve.config import ServiceConfig
from serve.errors import Unavailable
from serve.logs import bound
from serve.messages import (
    Claim,
    CloseDecoder,
    Control,
    Decoded,
    DecodeRequest,
    Encoded,
    EncodeImage,
    LeaseEvent,
    LeaseRequest,
    LeaseStarted,
    PackedEmbedding,
    PackedTensor,
    Process,
    QueuePlace,
)
from serve.silence import AnswerWatch, SilenceWatch, answers_its_health_check
from serve.status import DEVICE_FAULT, FailedElsewhere, Failure

ATTEMPTS = 4
"""How often a call that may be repeated is made before the session ends."""

RETRY_S = 0.25
"""Pause before the second attempt; it doubles."""

GOODBYE_S = 2.0
"""How long a call that only tidies up may take."""

T = TypeVar("T")


class Admission(Protocol):
    """Who decides which session gets which generator; :class:`~serve.admission.desk.AdmissionDesk` in the service."""

    def places(self, claim: Claim) -> AsyncGenerator[QueuePlace]:
        """Join the queue and yield where the session stands."""
        ...

    async def confirm(self, session_id: str, replica_id: str) -> None:
        """Say that the lease began."""
        ...

    async def refuse(self, session_id: str, replica_id: str, *, gone: bool) -> None:
        """Give a grant back."""
        ...

    async def retire(self, replica_id: str) -> None:
        """Say that a generator is dead."""
        ...

    async def requeue(self, session_id: str, replica_id: str) -> None:
        """Say that a running session has lost its generator and needs another one; then ask for its places again."""
        ...

    async def leave(self, session_id: str) -> None:
        """Say that the session is over."""
        ...


class Backends(Protocol):
    """What a session needs of the rest of the service."""

    @property
    def admission(self) -> Admission:
        """Who leads to a generator."""
        ...

    @property
    def mailbox(self) -> Any:  # noqa: ANN401  (ray's handles are untyped)
        """What goes into a :class:`LeaseRequest`."""
        ...

    def lease(self, request: LeaseRequest) -> AsyncGenerator[LeaseEvent]:
        """Run a lease and yield what it yields.

        Raises:
            Unavailable: If the generator died.
        """
        ...

    async def open_mailbox(self, log_id: str) -> None:
        """Create a log."""
        ...

    async def put(self, log_id: str, message: Control) -> None:
        """Append to a log."""
        ...

    async def close_mailbox(self, log_id: str) -> None:
        """Forget a log."""
        ...

    async def encode(self, text: str) -> PackedEmbedding:
        """Return a prompt's embedding.

        Raises:
            Unavailable: If no text encoder answers.
        """
        ...

    async def decode(self, request: DecodeRequest) -> Decoded:
        """Return a chunk's frames, or NEED_PRIME.

        Raises:
            Unavailable: If no decoder answers.
        """
        ...

    async def encode_image(self, request: EncodeImage) -> PackedTensor:
        """Return a start image's latents.

        Raises:
            FailedElsewhere: If the file is damaged.
            Unavailable: If no decoder answers.
        """
        ...

    async def close_decoder(self, request: CloseDecoder) -> None:
        """Say that a session is over."""
        ...


class RayBackends:
    """The service on Ray Serve."""

    def __init__(
        self,
        *,
        desk: AdmissionDesk,
        mailbox: Any,  # noqa: ANN401  (ray's handles are untyped)
        text_encoder: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
        decoder: DeploymentHandle[Any],
        config: ServiceConfig,
    ) -> None:
        self.admission = desk
        self.mailbox = mailbox
        self._silence = SilenceWatch(
            unread=mailbox.unread.remote,
            silence_s=config.generator.silence_timeout_s,
            answers=lambda replica_id: answers_its_health_check(replica_actor(generator, replica_id)),
            end=lambda lease: end_replica(replica_actor(generator, lease.replica_id), lease.process),
        )
        self._text_watch = _watch(text_encoder, config.text_encoder.silence_timeout_s)
        self._decoder_watch = _watch(decoder, config.vae_decoder.silence_timeout_s)
        self._model = config.model_key
        self._text_encoder = text_encoder
        self._generator = generator.options(stream=True)
        self._decoder = decoder
        self._decoders: dict[str, str] = {}

    def holdings(self) -> dict[str, int]:
        """Return how much is kept of sessions: claims, watched leases, known decoders."""
        return {
            "tickets": self.admission.ticket_count,
            "leases": self._silence.lease_count,
            "decoders": len(self._decoders),
        }

    async def lease(self, request: LeaseRequest) -> AsyncGenerator[LeaseEvent]:
        """Run a lease; closing the iteration cancels it."""
        response: Any = self._generator.lease.remote(replace(request, model=self._model))
        try:
            with contextlib.ExitStack() as watched:
                async for event in response:
                    if isinstance(event, LeaseStarted):
                        watched.enter_context(self._silence.over(request.log_id, event))
                    yield event
        except RayActorError as error:
            raise Unavailable("the generator of this session died", reason="GENERATOR_LOST") from error
        finally:
            response.cancel()

    async def open_mailbox(self, log_id: str) -> None:
        """Create a log."""
        await self._mail(lambda: self.mailbox.open.remote(log_id))

    async def put(self, log_id: str, message: Control) -> None:
        """Append to a log."""
        await self._mail(lambda: self.mailbox.put.remote(log_id, message))

    async def close_mailbox(self, log_id: str) -> None:
        """Forget a log."""
        with contextlib.suppress(RayActorError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self.mailbox.close.remote(log_id)

    async def encode(self, text: str) -> PackedEmbedding:
        """Return a prompt's embedding."""
        whose = bound().get("session_id", "")

        def call(_: int) -> Awaitable[Encoded | Failure]:
            return self._text_watch.answer(self._text_encoder.encode.remote(text, self._model, whose))

        answer = await _insist(call, "the text encoder", "TEXT_ENCODER_LOST")
        self._text_watch.heard(answer.process)
        return answer.embedding

    async def decode(self, request: DecodeRequest) -> Decoded:
        """Return a chunk's frames, or NEED_PRIME; after a death, from any decoder."""

        def call(attempt: int) -> Awaitable[Decoded | Failure]:
            asked = replace(request, model=self._model)
            if attempt or not request.replica_id:
                self._decoders.pop(request.session_id, None)
                asked = replace(asked, replica_id="", loads=dict(Counter(self._decoders.values())))
            return self._decoder_watch.answer(self._decoder.decode.remote(asked))

        answer = await _insist(call, "the decoder", "DECODER_LOST")
        if answer.process is not None:
            self._decoder_watch.heard(answer.process)
        self._decoders[request.session_id] = answer.replica_id
        return answer

    async def encode_image(self, request: EncodeImage) -> PackedTensor:
        """Return a start image's latents, from any decoder."""
        asked = replace(request, model=self._model)

        def call(_: int) -> Awaitable[PackedTensor | Failure]:
            return self._decoder_watch.answer(self._decoder.encode_image.remote(asked))

        return await _insist(call, "the decoder", "DECODER_LOST")

    async def close_decoder(self, request: CloseDecoder) -> None:
        """Say that a session is over; a decoder that does not hear it forgets the session by itself."""
        self._decoders.pop(request.session_id, None)
        with contextlib.suppress(RayActorError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._decoder.close.remote(request)

    async def _mail(self, call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except RayActorError as error:
            raise Unavailable("the mailbox of this session died", reason="GATEWAY_LOST") from error


def replica_actor(deployment: DeploymentHandle[Any], replica_id: str) -> Any:  # noqa: ANN401  (ray's handles)
    """Return the actor behind a replica, by the name that Serve gives it; None if there is none any more."""
    name = f"SERVE_REPLICA::{deployment.app_name}#{deployment.deployment_name}#{replica_id}"
    try:
        return ray.get_actor(name, namespace="serve")
    except ValueError:
        return None


def end_replica(actor: Any, process: Process) -> None:  # noqa: ANN401  (ray's handles are untyped)
    """End a replica for everyone who waits for it, and its process, whatever that does; Serve starts another one.

    Ray asks a process to end itself, which a stopped one does not (measured), so another one on its node kills it.
    """
    if actor is not None:
        ray.kill(actor)
    there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    kill: Any = ray.remote(_kill)
    kill.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(process.process_id)


def _watch(deployment: DeploymentHandle[Any], silence_s: float) -> AnswerWatch:
    """Return what waits for a deployment's answers."""
    return AnswerWatch(
        silence_s,
        answers=lambda replica_id: answers_its_health_check(replica_actor(deployment, replica_id)),
        end=lambda process: end_replica(replica_actor(deployment, process.replica_id), process),
    )


def _kill(process_id: int) -> None:
    """Kill a replica's process on this node, if it is still there."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        if Path(f"/proc/{process_id}/cmdline").read_bytes().startswith(b"ray::ServeReplica"):
            os.kill(process_id, signal.SIGKILL)


async def _insist(call: Callable[[int], Awaitable[T | Failure]], what: str, reason: str) -> T:
    """Return a call's answer; a replica that dies during it is not the end, and one device fault is none either.

    Raises:
        Unavailable: If replicas died again and again.
        FailedElsewhere: If the answer is a failure; a second device fault says that the request is the likely cause.
    """
    faults = 0
    for attempt in range(ATTEMPTS):
        try:
            answer = await call(attempt)
        except RayActorError as error:
            if attempt == ATTEMPTS - 1:
                raise Unavailable(f"{what} died {ATTEMPTS} times", reason=reason) from error
        else:
            if not isinstance(answer, Failure):
                return answer
            faults += answer.reason == DEVICE_FAULT
            if faults != 1 or attempt == ATTEMPTS - 1:
                raise FailedElsewhere(answer)
        await asyncio.sleep(RETRY_S * 2**attempt)
    raise AssertionError("unreachable")
