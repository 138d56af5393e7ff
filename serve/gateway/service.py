"""What a gateway does, without Serve around it: who may call, the sessions it carries, and the calls about sessions."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc

from causal_forcing.errors import NoCapacity
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.access.guard import TenantGuard
from serve.access.identity import Caller, Identity
from serve.access.moderation import Moderator
from serve.access.usage import UsageRecord, UsageWriter
from serve.config import ServiceConfig
from serve.detached import detached
from serve.errors import EndedByOperator, NoSuchSession, NotAllowed
from serve.logs import LOGGER, bind
from serve.messages import Progress, SessionView, Share
from serve.status import GATEWAY_LOST, Failure, failure_of

from .backends import Backends
from .inputs import Input
from .model_facts import describe_model
from .outbox import Outbox
from .requests import duration_ns
from .session import LiveSession
from .session_meter import SessionMeter

RELOAD_EVERY_S = 2.0
"""How often files that operators change are looked at."""

CLIENT_GONE = "CLIENT_GONE"
"""How a session ended whose client left without a word."""

T = TypeVar("T")


class CallContext(Protocol):
    """What is needed of a gRPC call: Serve's context and grpc.aio's have it."""

    def peer(self) -> str:
        """Return where the call comes from."""
        ...

    def invocation_metadata(self) -> Iterable[Any]:
        """Return what the client sent before its first message."""
        ...

    def trailing_metadata(self) -> Iterable[Any]:
        """Return what the client will be sent after the last message."""
        ...

    def set_trailing_metadata(self, metadata: Any, /) -> None:  # noqa: ANN401  (tuples of pairs, or lists)
        """Set what the client will be sent after the last message."""
        ...

    def set_code(self, code: grpc.StatusCode, /) -> None:
        """Set what the call ends with."""
        ...

    def set_details(self, details: str, /) -> None:
        """Set the text of what the call ends with."""
        ...


class Directory(Protocol):
    """All sessions of the service (see :class:`~serve.admission.desk.AdmissionDesk`)."""

    async def sessions(self) -> list[SessionView]:
        """Return all sessions."""
        ...

    async def end(self, session_id: str) -> bool:
        """Have a session ended; return whether it is known."""
        ...

    async def spend_prompt(self, tenant: str, per_minute: int) -> float:
        """Count a tenant's prompt; return 0, or the seconds after which it may come again."""
        ...

    def change_shares(self, share_of: Callable[[str], Share]) -> None:
        """Give every tenant its new share."""
        ...


@dataclass
class CarriedSession:
    """A session of this gateway.

    Attributes:
        tenant: Whose it is.
        live: What drives it.
        began_s: When its call came.
        end: How it ended, as far as is known.
    """

    tenant: str
    live: LiveSession
    began_s: float
    end: str = CLIENT_GONE


class GatewayService:
    """Carries sessions and answers calls."""

    def __init__(self, config: ServiceConfig, backends: Backends, directory: Directory, process: str) -> None:
        """Read the files that the configuration names.

        Raises:
            InvalidRequest: If one of them, or the moderation hook, is not right.
        """
        self._config = config
        self._backends = backends
        self._directory = directory
        self._identity = Identity(config.identity, any_peer=config.serves_any_peer)
        self._moderator = Moderator(config.moderation) if config.moderation is not None else None
        self._usage = UsageWriter(config.usage, process)
        self._sessions: dict[str, CarriedSession] = {}

    @property
    def session_count(self) -> int:
        """Sessions that are carried."""
        return len(self._sessions)

    async def serve(
        self, open_input: Callable[[ServiceConfig], Input], context: CallContext, meter: SessionMeter | None = None
    ) -> AsyncGenerator[pb.StreamVideoResponse]:
        """Serve one session; the last message says how it ended, and the context's status is the same."""
        set_status(context, GATEWAY_LOST)  # what the client gets if this process dies: nobody can say it then
        session_id = uuid.uuid4().hex
        bind(session_id=session_id, request_id=request_id(context))
        try:
            caller = self._identify(context)
            self._require_room()
        except Exception as error:  # noqa: BLE001  (the gRPC boundary: every error becomes a message)
            failure = failure_of(error)
            set_status(context, failure)
            outbox = Outbox()
            outbox.failed(failure)
            yield await anext(outbox)
            if meter is not None:
                meter.close()
            return
        bind(tenant=caller.tenant)
        service = self._config_for(caller)
        guard = TenantGuard(session_id, caller, self._moderator, self._directory.spend_prompt)
        live = LiveSession(session_id, service, self._backends, open_input(service), guard, meter=meter)
        carried = self._sessions[session_id] = CarriedSession(caller.tenant, live, time.monotonic())
        LOGGER.info("a session begins")
        try:
            async with contextlib.aclosing(live.messages()) as messages:
                async for message in messages:
                    _note_end(message, carried, context)
                    yield message
        finally:
            if meter is not None:
                meter.close()
            del self._sessions[session_id]
            self._close(session_id, carried)

    async def get_model(self, _request: pb.GetModelRequest, context: CallContext) -> pb.GetModelResponse:
        """Tell what runs here."""

        async def describe() -> pb.GetModelResponse:
            return describe_model(self._config_for(self._identify(context)))

        return await answer(context, describe, pb.GetModelResponse())

    async def get_session(self, request: pb.GetSessionRequest, context: CallContext) -> pb.GetSessionResponse:
        """Tell where one session stands, to its owner or an operator."""

        async def find() -> pb.GetSessionResponse:
            caller = self._identify(context)
            view = await self._find(request.session_id)
            if view.tenant != caller.tenant and not caller.is_operator:
                raise NotAllowed("this session is another tenant's", reason="NOT_SESSION_OWNER")
            return pb.GetSessionResponse(session=session_status(view))

        return await answer(context, find, pb.GetSessionResponse())

    async def list_sessions(self, _request: pb.ListSessionsRequest, context: CallContext) -> pb.ListSessionsResponse:
        """Tell an operator where all sessions stand."""

        async def find() -> pb.ListSessionsResponse:
            _require_operator(self._identify(context))
            views = await self._directory.sessions()
            return pb.ListSessionsResponse(sessions=[session_status(view) for view in views])

        return await answer(context, find, pb.ListSessionsResponse())

    async def end_session(self, request: pb.EndSessionRequest, context: CallContext) -> pb.EndSessionResponse:
        """End a session for an operator."""

        async def end() -> pb.EndSessionResponse:
            caller = self._identify(context)
            _require_operator(caller)
            if not await self._directory.end(request.session_id):
                raise NoSuchSession("there is no such session, or none any more")
            LOGGER.info("%s, an operator, ends session %s", caller.tenant, request.session_id)
            return pb.EndSessionResponse()

        return await answer(context, end, pb.EndSessionResponse())

    def progress(self) -> dict[str, Progress]:
        """Return what each session has had."""
        return {session_id: carried.live.progress() for session_id, carried in self._sessions.items()}

    def end(self, session_id: str) -> None:
        """End a session because an operator wants it; without effect when it is over."""
        carried = self._sessions.get(session_id)
        if carried is not None:
            carried.live.end(EndedByOperator("an operator has ended this session"))

    async def keep_reloading(self) -> None:
        """Look after the operators' files, for ever."""
        while True:
            await asyncio.sleep(RELOAD_EVERY_S)
            try:
                if await asyncio.to_thread(self._identity.refresh):
                    self.apply_policies()
            except Exception as error:  # noqa: BLE001  (a look that fails must not be the last one)
                failure_of(error)  # logs it without what the file says

    def apply_policies(self) -> None:
        """End the sessions of tenants that are banned now, and tell admission of new shares."""
        LOGGER.info("what tenants may do has changed")
        for carried in list(self._sessions.values()):
            if self._identity.caller(carried.tenant).policy.banned:
                carried.live.end(NotAllowed("this tenant is not served here", reason="TENANT_BANNED"))
        self._directory.change_shares(lambda tenant: self._identity.caller(tenant).policy.share(tenant))

    def _identify(self, context: CallContext) -> Caller:
        return self._identity.identify(context.invocation_metadata(), context.peer())

    def _require_room(self) -> None:
        limit = self._config.gateway.max_sessions
        if len(self._sessions) >= limit:
            raise NoCapacity(f"this gateway carries {limit} sessions, its limit")

    def _config_for(self, caller: Caller) -> ServiceConfig:
        """Return the configuration with the caller's own limits in it."""
        limits, longest_s = self._config.limits, caller.policy.max_session_s
        if longest_s is None or longest_s >= limits.max_session_s:
            return self._config
        own = {"max_session_s": longest_s, "max_generate_s": min(limits.max_generate_s, longest_s)}
        return self._config.model_copy(update={"limits": limits.model_copy(update=own)})

    async def _find(self, session_id: str) -> SessionView:
        for view in await self._directory.sessions():
            if view.session_id == session_id:
                return view
        raise NoSuchSession("there is no such session, or none any more")

    def _close(self, session_id: str, carried: CarriedSession) -> None:
        """Write down what a session used."""
        progress = carried.live.progress()
        LOGGER.info("a session ended: %s, %d frames", carried.end, progress.frame_count)
        record = UsageRecord(
            session_id=session_id,
            tenant=carried.tenant,
            preset=self._config.preset,
            age_s=time.monotonic() - carried.began_s,
            end=carried.end,
            progress=progress,
        )
        if self._config.usage is not None:
            detached(asyncio.to_thread(self._usage.write, record))


def session_status(view: SessionView) -> pb.SessionStatus:
    """Return the protocol's message for a session."""
    progress = view.progress
    state = pb.SESSION_STATE_QUEUED
    if view.is_running:
        state = pb.SESSION_STATE_PAUSED if progress.is_paused else pb.SESSION_STATE_RUNNING
    status = pb.SessionStatus(
        session_id=view.session_id,
        tenant=view.tenant,
        state=pb.SessionState.Name(state),
        sessions_ahead_count=view.ahead,
        chunk_count=progress.chunk_count,
        frame_count=progress.frame_count,
        byte_count=progress.byte_count,
        dropped_frame_count=progress.dropped_frame_count,
        gateway_memory_byte_count=progress.memory_bytes,
    )
    status.age.FromNanoseconds(duration_ns(view.age_s))
    return status


async def answer(context: CallContext, work: Callable[[], Awaitable[T]], empty: T) -> T:
    """Return a call's answer; an error becomes the call's status, with its details in the trailing metadata.

    Args:
        context: Of the gRPC call that is answered.
        work: Makes the answer.
        empty: What Serve and gRPC want returned beside an error.
    """
    try:
        return await work()
    except Exception as error:  # noqa: BLE001  (the gRPC boundary: every error becomes a status)
        failure = failure_of(error)
        set_status(context, failure)
        details = failure.to_proto().status.SerializeToString()
        context.set_trailing_metadata((*(context.trailing_metadata() or ()), ("grpc-status-details-bin", details)))
        return empty


def set_status(context: CallContext, status: Failure | pb.Error | None) -> None:
    """Set what the call will end with; it travels with the next message. None is the status OK."""
    if isinstance(status, Failure):
        context.set_code(status.status_code)
        context.set_details(status.details)
    elif status is not None:
        code = next(code for code in grpc.StatusCode if code.value[0] == status.status.code)
        context.set_code(code)
        context.set_details(status.status.message)
    else:
        context.set_code(grpc.StatusCode.OK)
        context.set_details("the session has ended")  # an empty text would leave the one before in place


def request_id(context: CallContext) -> str:
    """Return Serve's name for a call; empty outside of Serve."""
    found = dict(context.trailing_metadata() or ()).get("request_id", "")
    return found if isinstance(found, str) else ""


def _require_operator(caller: Caller) -> None:
    if not caller.is_operator:
        raise NotAllowed("this call is for operators", reason="NOT_OPERATOR")


def _note_end(message: pb.StreamVideoResponse, carried: CarriedSession, context: CallContext) -> None:
    """Let the call's status, and what is kept of the session, be what the last message says."""
    if message.HasField("session_ended"):
        carried.end = pb.EndReason.Name(message.session_ended.reason).removeprefix("END_REASON_")
        set_status(context, None)
    elif message.HasField("error"):
        carried.end = message.error.reason
        set_status(context, message.error)
