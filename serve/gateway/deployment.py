"""The gateway deployment: what clients and HTTP reach; methods are named after the RPCs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from protos.causal_forcing.v1 import video_pb2 as pb
from serve import logs
from serve.admission import succession
from serve.admission.actor import connect
from serve.admission.desk import AdmissionDesk
from serve.config import ServiceConfig
from serve.detached import detached
from serve.logs import LOGGER
from serve.mailbox import start_mailbox
from serve.metrics import Role
from serve.metrics.process import replica_recorder, watch_replica
from serve.tracing import Tracing

from .backends import RayBackends
from .http import HttpEndpoints, running_replicas
from .inputs import OneRequest, StreamInput
from .service import GatewayService
from .session_meter import SessionMeter


class Gateway:
    """A Serve replica that carries sessions."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: ServiceConfig,
        admission: str,
        text_encoder: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
        decoder: DeploymentHandle[Any],
    ) -> None:
        self._recorder = replica_recorder(Role.GATEWAY)
        watch_replica(self._recorder, config, Role.GATEWAY)
        logs.set_up(config.logs)
        replica = serve.get_replica_context()
        replica_id: str = replica.replica_id.unique_id
        self._tracing = Tracing(config.observability.tracing, replica_id)
        is_current = partial(succession.is_current, replica.app_name, admission)
        desk = AdmissionDesk(connect(admission, config), replica_id, is_current)
        self._backends = backends = RayBackends(
            desk=desk,
            mailbox=start_mailbox(config.gateway.max_sessions),
            text_encoder=text_encoder,
            generator=generator,
            decoder=decoder,
            config=config,
        )
        self._service = GatewayService(config, backends, desk, replica_id)
        desk.carry(self._service)
        desk.start()
        self._http = HttpEndpoints(config, lambda: running_replicas(replica.app_name))
        detached(self._service.keep_reloading())
        await asyncio.to_thread(succession.announce, replica.app_name, admission)
        LOGGER.info("configuration: %s", config.model_dump_json())

    async def StreamVideo(  # noqa: N802  (the RPC's name)
        self, requests: AsyncIterator[pb.StreamVideoRequest], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.StreamVideoResponse]:
        """Serve one session (see the protocol's transcript)."""
        meter = self._meter(grpc_context)
        serving = self._service.serve(lambda config: StreamInput(meter.watch(requests), config), grpc_context, meter)
        async with contextlib.aclosing(serving) as messages:
            async for message in messages:
                yield message
                meter.sent(message)

    async def GenerateVideo(  # noqa: N802  (the RPC's name)
        self, request: pb.GenerateVideoRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateVideoResponse]:
        """Serve one video of a given length."""
        meter = self._meter(grpc_context)
        meter.configured(request.config)
        serving = self._service.serve(lambda config: OneRequest(request, config), grpc_context, meter)
        async with contextlib.aclosing(serving) as messages:
            async for message in messages:
                yield pb.GenerateVideoResponse(message=message)
                meter.sent(message)

    def _meter(self, context: RayServegRPCContext) -> SessionMeter:
        return SessionMeter(self._recorder, trace=self._tracing.session(context.invocation_metadata()))

    async def GetModel(  # noqa: N802  (the RPC's name)
        self, request: pb.GetModelRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetModelResponse:
        """Tell what runs here."""
        return await self._service.get_model(request, grpc_context)

    async def GetSession(  # noqa: N802  (the RPC's name)
        self, request: pb.GetSessionRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetSessionResponse:
        """Tell where a session stands."""
        return await self._service.get_session(request, grpc_context)

    async def ListSessions(  # noqa: N802  (the RPC's name)
        self, request: pb.ListSessionsRequest, grpc_context: RayServegRPCContext
    ) -> pb.ListSessionsResponse:
        """Tell where all sessions stand."""
        return await self._service.list_sessions(request, grpc_context)

    async def EndSession(  # noqa: N802  (the RPC's name)
        self, request: pb.EndSessionRequest, grpc_context: RayServegRPCContext
    ) -> pb.EndSessionResponse:
        """End a session."""
        return await self._service.end_session(request, grpc_context)

    async def __call__(self, request: Request) -> Response:
        """Answer HTTP: `/healthz`, `/readyz`, `/version`."""
        return await self._http.respond(request)

    async def holdings(self) -> dict[str, int]:
        """Return what this process keeps for sessions: all zero, but for its own tasks, when there are none."""
        logs: int = await self._backends.mailbox.count.remote()
        tasks = len(asyncio.all_tasks())
        return {"sessions": self._service.session_count, "logs": logs, **self._backends.holdings(), "tasks": tasks}
