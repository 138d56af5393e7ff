"""`causal-forcing sessions` and `status` against a gateway without Ray."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from causal_forcing.cli import main
from causal_forcing.version import __version__
from serve.commands.connecting import API_KEY_VARIABLE
from serve.gateway.http import HttpEndpoints
from tests.serve.fakes import simulated
from tests.serve.gateway.test_service import Running, keyed, last, running

__all__ = ["keyed"]

ALL = ("Gateway", "TextEncoder", "Generator", "VaeDecoder")


@asynccontextmanager
async def http(replicas: Mapping[str, int]) -> AsyncIterator[str]:
    """Answer HTTP as a gateway does whose service has these replicas; yield the address."""
    endpoints = HttpEndpoints(simulated(), lambda: replicas)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoints.respond(Request(scope, receive))
        await response(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def command(*words: str) -> int:
    return await asyncio.to_thread(main, words)


def server(gateway: Running) -> tuple[str, str]:
    return "--server", f"127.0.0.1:{gateway.port}"


async def test_sessions_are_listed_shown_and_ended(
    keyed: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "ops")
    async with running(**keyed) as gateway:
        call, name = await gateway.open("a")
        assert await command("sessions", "list", *server(gateway)) == 0
        head, row = capsys.readouterr().out.splitlines()
        counts = ["chunks", "frames", "dropped", "MB", "memory"]
        assert head.split() == ["session", "tenant", "state", "age", "ahead", *counts]
        assert row.split()[:3] == [name, "a", "running"]
        assert await command("sessions", "show", name, "--json", *server(gateway)) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["session_id"], shown["state"], shown["sessions_ahead"]) == (name, "RUNNING", 0)
        assert await command("sessions", "end", name, *server(gateway)) == 0
        assert (await last(call)).error.reason == "SESSION_ENDED_BY_OPERATOR"


async def test_a_refusal_is_told(
    keyed: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "a")
    async with running(**keyed) as gateway:
        assert await command("sessions", "list", *server(gateway)) == 1
        assert "NOT_OPERATOR" in capsys.readouterr().err
        assert await command("sessions", "show", "nothing", *server(gateway)) == 1
        assert "NO_SUCH_SESSION" in capsys.readouterr().err
        monkeypatch.delenv(API_KEY_VARIABLE)
        assert await command("sessions", "list", *server(gateway)) == 1
        assert "BAD_CREDENTIALS" in capsys.readouterr().err


async def test_a_service_that_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as gateway, http(dict.fromkeys(ALL, 1)) as address:
        call, _ = await gateway.open()
        options = (*server(gateway), "--http", address)
        assert await command("status", *options) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines["service"] == f"127.0.0.1:{gateway.port}, version {__version__}"
        assert lines["ready"] == "yes"
        assert lines["model"] == "tiny (random weights), VAE wan, 16 frames a second"
        assert lines["sizes"] == "64x64"
        assert lines["sessions"] == "1 running, 0 paused, 0 queued"
        assert await command("status", "--json", *options) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["ready"] == {"ready": True, "missing": {}}
        assert told["sessions"] == {"running": 1, "paused": 0, "queued": 0}
        call.cancel()


async def test_a_service_that_is_not_ready_fails_and_says_why(
    keyed: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "a")
    replicas = dict.fromkeys(ALL, 1) | {"Generator": 0}
    async with running(**keyed) as gateway, http(replicas) as address:
        assert await command("status", *server(gateway), "--http", address) == 1
    told = capsys.readouterr().out
    assert "ready     no: Generator: no replica is loaded and warm" in told
    assert "sessions  shown to operators only" in told


def test_a_service_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--server", "127.0.0.1:1", "--http", "127.0.0.1:1"]) == 1
    told = capsys.readouterr()
    assert "ready     unknown: http://127.0.0.1:1/readyz does not answer (ConnectionRefusedError)" in told.out
    assert "UNAVAILABLE" in told.err


def test_an_authority_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "list", "--tls-ca", "/nowhere/ca.pem"]) == 2
    assert "tls_ca: got '/nowhere/ca.pem'; cannot be read" in capsys.readouterr().err
