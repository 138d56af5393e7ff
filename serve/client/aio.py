"""The asyncio client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import grpc

from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc

from .errors import VideoServiceError
from .events import SessionInfo, StreamOptions
from .reconnect import AsyncReconnectingSession, Retry
from .session import AsyncVideo, AsyncVideoSession

CALL_TIMEOUT_S = 15.0
"""How long the service may take to answer a call that is not a stream."""


class AsyncVideoClient:
    """A connection to the service.

    Args:
        address: ``host:port``.
        credentials: For TLS; None connects in clear text.
        metadata: Sent with every call, e.g. ``[("authorization", "Bearer ...")]``.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._metadata = tuple(metadata)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self._address)
        else:
            self._channel = grpc.aio.secure_channel(self._address, self._credentials)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._channel is not None:
            await self._channel.close(None)

    @asynccontextmanager
    async def stream(self, options: StreamOptions) -> AsyncIterator[AsyncVideoSession]:
        """Open a session, which begins at once, read or not; leaving the block ends it."""
        session = self._session(options)
        session.begin()
        try:
            yield session
        finally:
            await session.close()

    @asynccontextmanager
    async def keep_streaming(
        self, options: StreamOptions, retry: Retry | None = None
    ) -> AsyncIterator[AsyncReconnectingSession]:
        """Open a session that is followed by a new one whenever it is lost; leaving the block ends it.

        The iteration raises what cannot be helped: errors that do not pass, and the last one when tries run out.
        """
        session = AsyncReconnectingSession(self._session, options, retry or Retry())
        try:
            yield session
        finally:
            await session.close()

    @asynccontextmanager
    async def generate(self, options: StreamOptions, duration_s: float) -> AsyncIterator[AsyncVideo]:
        """Ask for a video of a given length, at its own pace and without acks; leaving the block ends it.

        Args:
            options: As for a session; ``credit_chunks`` and ``slow_client_policy`` must be left out.
            duration_s: Length of the video; the service's model says how much it may be.
        """
        request = pb.GenerateVideoRequest(config=options.to_proto())
        request.duration.FromNanoseconds(round(duration_s * 1e9))
        video = AsyncVideo(self._stub.GenerateVideo(request, metadata=self._metadata or None), options.codec)
        try:
            yield video
        finally:
            await video.close()

    async def get_model(self) -> pb.GetModelResponse:
        """Return which model runs and what sessions may ask for.

        Raises:
            VideoServiceError: If the service does not answer, or not this caller.
        """
        model: pb.GetModelResponse = await self._call(self._stub.GetModel, pb.GetModelRequest())
        return model

    async def get_session(self, session_id: str) -> SessionInfo:
        """Return where one of the caller's sessions stands (any session, for an operator).

        Raises:
            VideoServiceError: If there is no such session, or it is another tenant's.
        """
        request = pb.GetSessionRequest(session_id=session_id)
        answer: pb.GetSessionResponse = await self._call(self._stub.GetSession, request)
        return SessionInfo.from_proto(answer.session)

    async def list_sessions(self) -> list[SessionInfo]:
        """Return all sessions of the service: who waits longest first, then who runs longest.

        Raises:
            VideoServiceError: If the caller is not an operator.
        """
        answer: pb.ListSessionsResponse = await self._call(self._stub.ListSessions, pb.ListSessionsRequest())
        return [SessionInfo.from_proto(status) for status in answer.sessions]

    async def end_session(self, session_id: str) -> None:
        """Have a session ended; its client is told that an operator did.

        Raises:
            VideoServiceError: If there is no such session, or the caller is not an operator.
        """
        await self._call(self._stub.EndSession, pb.EndSessionRequest(session_id=session_id))

    def _session(self, options: StreamOptions) -> AsyncVideoSession:
        return AsyncVideoSession(self._stub.StreamVideo(metadata=self._metadata or None), options)

    async def _call(self, method: Any, request: Any) -> Any:  # noqa: ANN401  (grpc's stubs are untyped)
        try:
            return await method(request, metadata=self._metadata or None, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise VideoServiceError.from_call(error) from None

    @property
    def _stub(self) -> Any:  # noqa: ANN401  (grpc's stubs are untyped)
        if self._channel is None:
            raise RuntimeError("use the client as a context manager")
        return video_pb2_grpc.VideoServiceStub(self._channel)  # type: ignore[no-untyped-call]
