"""The gateway deployment: speaks gRPC with the clients and drives their sessions."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from causal_forcing.errors import CausalForcingError, NoCapacity
from protos.causal_forcing.v1 import video_pb2 as pb

from .admission_actor import connect
from .backends import RayBackends
from .config import ServiceConfig
from .desk import AdmissionDesk
from .identity import Identity
from .inputs import Input, OneRequest, StreamInput
from .mailbox import start_mailbox
from .model_facts import describe_model
from .outbox import Outbox
from .session import LiveSession
from .status import GATEWAY_LOST, LOGGER, Failure, failure_of


class Gateway:
    """A Serve replica that carries sessions; methods are named after the RPCs."""

    def __init__(
        self,
        config: ServiceConfig,
        admission: str,
        text_encoder: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
        decoder: DeploymentHandle[Any],
    ) -> None:
        self._config = config
        self._identity = Identity(config.identity, any_peer=config.serves_any_peer)
        self._sessions: set[str] = set()
        replica_id: str = serve.get_replica_context().replica_id.unique_id
        desk = AdmissionDesk(connect(admission, config), replica_id)
        self._backends = RayBackends(
            desk=desk,
            mailbox=start_mailbox(config.gateway.max_sessions),
            text_encoder=text_encoder,
            generator=generator,
            decoder=decoder,
            generator_silence_s=config.generator.silence_timeout_s,
        )
        LOGGER.info("configuration: %s", config.model_dump_json())

    async def StreamVideo(  # noqa: N802  (the RPC's name)
        self, requests: AsyncIterator[pb.StreamVideoRequest], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.StreamVideoResponse]:
        """Serve one session (see the protocol's transcript)."""
        async with contextlib.aclosing(self._serve(StreamInput(requests, self._config), grpc_context)) as messages:
            async for message in messages:
                yield message

    async def GenerateVideo(  # noqa: N802  (the RPC's name)
        self, request: pb.GenerateVideoRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateVideoResponse]:
        """Serve one video of a given length."""
        async with contextlib.aclosing(self._serve(OneRequest(request, self._config), grpc_context)) as messages:
            async for message in messages:
                yield pb.GenerateVideoResponse(message=message)

    async def GetModel(  # noqa: N802  (the RPC's name)
        self, request: pb.GetModelRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetModelResponse:
        """Tell what runs here."""
        del request
        refusal = self._refusal(grpc_context)
        if refusal is not None:
            set_status(grpc_context, failure_of(refusal))
            return pb.GetModelResponse()
        return describe_model(self._config)

    async def _serve(self, client: Input, grpc_context: RayServegRPCContext) -> AsyncGenerator[pb.StreamVideoResponse]:
        set_status(grpc_context, GATEWAY_LOST)  # what the client gets if this process dies: nobody can say it then
        refusal = self._refusal(grpc_context) or self._no_room()
        if refusal is not None:
            failure = failure_of(refusal)
            set_status(grpc_context, failure)
            outbox = Outbox()
            outbox.failed(failure)
            yield await anext(outbox)
            return
        session_id = uuid.uuid4().hex
        self._sessions.add(session_id)
        session = LiveSession(session_id, self._config, self._backends, client)
        try:
            async with contextlib.aclosing(session.messages()) as messages:
                async for message in messages:
                    if message.HasField("session_ended"):
                        set_status(grpc_context, None)
                    elif message.HasField("error"):
                        set_status(grpc_context, message.error)
                    yield message
        finally:
            self._sessions.discard(session_id)

    async def __call__(self, _request: Request) -> Response:
        """Answer HTTP: the port is there for Serve's `/-/healthz` and `/-/routes` alone."""
        return PlainTextResponse("This service speaks gRPC: causal_forcing.v1.VideoService.\n", status_code=404)

    async def session_count(self) -> int:
        """Return the number of sessions that this replica carries."""
        return len(self._sessions)

    def _refusal(self, grpc_context: RayServegRPCContext) -> CausalForcingError | None:
        """Return why a caller is not served at all, or None."""
        try:
            self._identity.identify(grpc_context.invocation_metadata(), grpc_context.peer())
        except CausalForcingError as error:
            return error
        return None

    def _no_room(self) -> CausalForcingError | None:
        """Return why nobody gets another session here, or None."""
        if len(self._sessions) >= self._config.gateway.max_sessions:
            return NoCapacity(f"this gateway carries {len(self._sessions)} sessions, its limit")
        return None


def set_status(context: RayServegRPCContext, status: Failure | pb.Error | None) -> None:
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
