"""The HTTP endpoints without Serve around them."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from causal_forcing.version import __version__
from serve.config import ServiceConfig
from serve.gateway import http
from serve.gateway.http import READY_CACHE_S, HttpEndpoints, needed_deployments
from tests.serve.fakes import simulated

ALL = {"Gateway": 1, "TextEncoder": 1, "Generator": 1, "VaeDecoder": 1}


class Service:
    """A service whose replicas and clock a test moves."""

    def __init__(self, config: ServiceConfig | None = None, **running: int) -> None:
        self.running: Mapping[str, int] | Exception = running
        self.asked = 0
        self.now_s = 0.0
        self._endpoints = HttpEndpoints(config or simulated(), self._ask, lambda: self.now_s)

    def _ask(self) -> Mapping[str, int]:
        self.asked += 1
        if isinstance(self.running, Exception):
            raise self.running
        return self.running

    async def get(self, path: str, method: str = "GET") -> Response:
        return await self._endpoints.respond(Request({"type": "http", "method": method, "path": path, "headers": []}))

    async def ready(self) -> tuple[int, dict[str, str]]:
        """Return the status of /readyz, and what it says is missing."""
        response = await self.get("/readyz")
        said: dict[str, Any] = json.loads(bytes(response.body))
        assert said["ready"] == (response.status_code == 200)
        return response.status_code, said["missing"]


async def test_a_gateway_that_answers_is_alive_whatever_else_is_there() -> None:
    service = Service()
    response = await service.get("/healthz")
    assert (response.status_code, response.body) == (200, b"ok\n")
    assert not service.asked


async def test_a_service_is_ready_when_everything_that_it_needs_is_loaded_and_warm() -> None:
    service = Service(Gateway=1)
    status, missing = await service.ready()
    assert (status, list(missing)) == (503, ["TextEncoder", "Generator", "VaeDecoder"])
    assert "loaded and warm" in missing["Generator"]
    service.running, service.now_s = {**ALL, "Generator": 0}, READY_CACHE_S
    assert list((await service.ready())[1]) == ["Generator"]
    service.running, service.now_s = ALL, 2 * READY_CACHE_S
    assert await service.ready() == (200, {})


async def test_the_controller_is_asked_once_a_second_at_most() -> None:
    service = Service(**ALL)
    assert (await service.ready())[0] == 200
    service.running = {}
    assert (await service.ready())[0] == 200
    assert service.asked == 1
    service.now_s = READY_CACHE_S
    assert (await service.ready())[0] == 503
    assert service.asked == 2


async def test_what_may_go_down_to_none_is_not_missed() -> None:
    scaled = {"min_replicas": 0, "max_replicas": 2}
    config = simulated(generator={"autoscaling": scaled}, vae_decoder={"autoscaling": {**scaled, "min_replicas": 1}})
    assert needed_deployments(config) == ("Gateway", "TextEncoder", "VaeDecoder")
    assert await Service(config, Gateway=1, TextEncoder=1, VaeDecoder=1).ready() == (200, {})


async def test_a_service_that_cannot_ask_its_controller_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    service.running = ConnectionError("at a secret place")
    assert await service.ready() == (503, {"controller": "does not answer"})
    answers, hanging = threading.Event(), Service(**ALL)
    monkeypatch.setattr(http, "READY_TIMEOUT_S", 0.01)
    monkeypatch.setattr(hanging._endpoints, "_running", lambda: answers.wait() and ALL)
    assert await hanging.ready() == (503, {"controller": "does not answer"})
    answers.set()


async def test_the_version_is_told() -> None:
    said = json.loads(bytes((await Service().get("/version")).body))
    assert said == {"version": __version__, "preset": "tiny", "engine": "simulated"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("HEAD", "/healthz", 200), ("POST", "/healthz", 405), ("DELETE", "/", 405), ("GET", "/", 404), ("GET", "/x", 404)],
)
async def test_nothing_else_is_there(method: str, path: str, status: int) -> None:
    assert (await Service(**ALL).get(path, method)).status_code == status
