"""The HTTP endpoints, behind Serve's HTTP proxy: alive, ready, version.

Serve's own `/-/healthz` says that the proxy runs; these say what the service says of itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from causal_forcing.version import __version__
from serve.config import Scaled, ServiceConfig
from serve.logs import LOGGER

READY_CACHE_S = 1.0
"""How long an answer of `/readyz` is given again: what it takes is asked of Serve's controller."""

READY_TIMEOUT_S = 5.0
"""How long the controller may take; then the service is not ready."""

RunningReplicas = Callable[[], Mapping[str, int]]
"""Returns the running replicas of each deployment (a replica runs when its weights are loaded and warm); may block."""


class HttpEndpoints:
    """Answers HTTP."""

    def __init__(
        self, config: ServiceConfig, running: RunningReplicas, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._running = running
        self._clock = clock
        self._known: tuple[float, dict[str, str]] | None = None
        self._lock = asyncio.Lock()

    async def respond(self, request: Request) -> Response:
        """Return the answer to a request."""
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("only GET\n", status_code=405, headers={"allow": "GET, HEAD"})
        match request.url.path:
            case "/healthz":
                return PlainTextResponse("ok\n")
            case "/readyz":
                missing = await self._missing()
                status = 503 if missing else 200
                return JSONResponse({"ready": not missing, "missing": missing}, status_code=status)
            case "/version":
                config = self._config
                return JSONResponse({"version": __version__, "preset": config.preset, "engine": config.engine})
        return PlainTextResponse("This service speaks gRPC: causal_forcing.v1.VideoService.\n", status_code=404)

    async def _missing(self) -> dict[str, str]:
        """Return the deployments that are needed and not there, and why; recent answers are given again."""
        async with self._lock:
            now_s = self._clock()
            if self._known is None or now_s - self._known[0] >= READY_CACHE_S:
                self._known = (now_s, await self._ask())
            return self._known[1]

    async def _ask(self) -> dict[str, str]:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                running = await asyncio.to_thread(self._running)
        except Exception as error:  # noqa: BLE001  (whatever is wrong with the controller: we do not know that we are ready)
            LOGGER.warning("the state of the deployments cannot be asked for: %s", type(error).__name__)
            return {"controller": "does not answer"}
        return {
            name: "no replica is loaded and warm" for name in needed_deployments(self._config) if not running.get(name)
        }


def needed_deployments(config: ServiceConfig) -> tuple[str, ...]:
    """Return the deployments that have a replica whenever the service is ready: those that may not go down to none."""
    parts: dict[str, Scaled] = {
        "Gateway": config.gateway,
        "TextEncoder": config.text_encoder,
        "Generator": config.generator,
        "VaeDecoder": config.vae_decoder,
    }
    return tuple(name for name, part in parts.items() if part.autoscaling is None or part.autoscaling.min_replicas)


def running_replicas(app_name: str) -> Mapping[str, int]:
    """Return the running replicas of each deployment of an application, by asking Serve's controller."""
    from ray import serve

    application = serve.status().applications.get(app_name)
    deployments = application.deployments if application is not None else {}
    return {
        name: sum(count for state, count in found.replica_states.items() if state == "RUNNING")
        for name, found in deployments.items()
    }
