"""The gateway without Ray, behind a real gRPC server: who is served, calls about sessions, bills, bans, moderation."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc
from serve.access.config import LogConfig
from serve.access.moderation import Question, Verdict
from serve.gateway.inputs import OneRequest, StreamInput
from serve.gateway.service import GatewayService
from serve.logs import set_up
from serve.messages import SessionView, Share
from tests.serve.fakes import FakeBackends, simulated

PROMPT = "a very private prompt"


@dataclass
class FakeDirectory:
    """Knows the sessions of one gateway."""

    service: GatewayService | None = None
    shares: list[Share] = field(default_factory=list)
    wait_s: float = 0.0

    async def sessions(self) -> list[SessionView]:
        assert self.service is not None
        carried = self.service._sessions
        return [
            SessionView(name, session.tenant, True, 0, 1.5, session.live.progress())
            for name, session in carried.items()
        ]

    async def end(self, session_id: str) -> bool:
        assert self.service is not None
        known = session_id in self.service._sessions
        self.service.end(session_id)
        return known

    async def spend_prompt(self, tenant: str, per_minute: int) -> float:
        return self.wait_s

    def change_shares(self, share_of: Callable[[str], Share]) -> None:
        self.shares = [share_of("a")]


class Servicer(video_pb2_grpc.VideoServiceServicer):
    """Methods as the deployment has them."""

    def __init__(self, service: GatewayService) -> None:
        self.service = service
        self.GetModel = service.get_model
        self.GetSession = service.get_session
        self.ListSessions = service.list_sessions
        self.EndSession = service.end_session

    async def StreamVideo(self, requests: Any, context: Any) -> AsyncIterator[pb.StreamVideoResponse]:  # noqa: N802
        async for message in self.service.serve(lambda config: StreamInput(requests, config), context):
            yield message

    async def GenerateVideo(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateVideoResponse]:  # noqa: N802
        async for message in self.service.serve(lambda config: OneRequest(request, config), context):
            yield pb.GenerateVideoResponse(message=message)


@dataclass
class Running:
    """A served gateway and a client of it."""

    service: GatewayService
    backends: FakeBackends
    directory: FakeDirectory
    stub: Any
    port: int

    def stream(self, key: str = "", prompt: str = PROMPT, **limits: Any) -> Any:
        return self.stub.StreamVideo(metadata=auth(key))

    async def open(self, key: str = "", prompt: str = PROMPT) -> tuple[Any, str]:
        """Return a call with a session that runs, and its name."""
        call = self.stream(key)
        await send_config(call, prompt)
        while not (message := await call.read()).HasField("session_started"):
            assert not message.HasField("error"), message
        return call, message.session_started.session_id


def rewrite(path: Path, text: str) -> None:
    path.write_text(text)


def auth(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")] if key else []


async def send_config(call: Any, text: str = PROMPT) -> None:
    prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text=text)])
    await call.write(pb.StreamVideoRequest(config=pb.SessionConfig(prompt=prompt, seed=1)))


async def last(call: Any) -> pb.StreamVideoResponse:
    """Return a call's last message."""
    message = None
    async with asyncio.timeout(20):
        with contextlib.suppress(grpc.aio.AioRpcError):  # the call ends with the error's code
            while isinstance(got := await call.read(), pb.StreamVideoResponse):
                message = got
    assert message is not None
    return message


async def finished(call: Any, frame: pb.VideoFrame) -> None:
    """Acknowledge a chunk with its last frame."""
    if frame.last_in_chunk:
        await call.write(pb.StreamVideoRequest(ack=pb.Ack(chunk_index=frame.chunk_index)))


async def refusal(call: Any, text: str) -> pb.PromptRefused:
    """Send a prompt that is refused; return what is said of it."""
    update = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text=text)], prompt_id="mine")
    await call.write(pb.StreamVideoRequest(prompt=update))
    async with asyncio.timeout(20):
        while not (message := await call.read()).HasField("prompt_refused"):
            assert not message.HasField("error"), message
            assert message.frame.prompt_id != "mine"
            await finished(call, message.frame)
    refused: pb.PromptRefused = message.prompt_refused
    return refused


async def goes_on(call: Any, prompt_id: str) -> None:
    """Acknowledge what comes until frames show a prompt beyond what was under way; end the session well."""
    shown = 0
    async with asyncio.timeout(20):
        while shown < 4:
            frame = (await call.read()).frame
            shown += frame.last_in_chunk and frame.prompt_id == prompt_id
            await finished(call, frame)
    await call.write(pb.StreamVideoRequest(end=pb.End()))
    assert (await last(call)).HasField("session_ended")


@asynccontextmanager
async def running(**fields: Any) -> AsyncIterator[Running]:
    backends, directory = FakeBackends(simulated(**fields)), FakeDirectory()
    service = GatewayService(backends.service, backends, directory, "gateway-1")
    directory.service = service
    server = grpc.aio.server()
    video_pb2_grpc.add_VideoServiceServicer_to_server(Servicer(service), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Running(service, backends, directory, video_pb2_grpc.VideoServiceStub(channel), port)
    finally:
        await server.stop(None)


@pytest.fixture
def keyed(tmp_path: Path) -> dict[str, Any]:
    """A configuration with three tenants: a, b, and ops, an operator; keys are their names."""
    keys = [{"sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": name} for name in ("a", "b", "ops")]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
    (tmp_path / "tenants.yaml").write_text("tenants: {ops: {operator: true}, a: {max_session_s: 5}}")
    identity = {
        "mode": "api_keys",
        "api_keys_file": str(tmp_path / "keys.json"),
        "tenants_file": str(tmp_path / "tenants.yaml"),
    }
    return {"identity": identity, "usage": {"file": str(tmp_path / "usage.jsonl")}}


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    return caught.value.code(), info.reason


async def test_a_stranger_is_refused_everywhere(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as gateway:
        call = gateway.stream("unknown")
        error = (await last(call)).error
        assert (await call.code(), error.reason) == (grpc.StatusCode.UNAUTHENTICATED, "BAD_CREDENTIALS")
        for method, request in (
            (gateway.stub.GetModel, pb.GetModelRequest()),
            (gateway.stub.GetSession, pb.GetSessionRequest()),
            (gateway.stub.ListSessions, pb.ListSessionsRequest()),
            (gateway.stub.EndSession, pb.EndSessionRequest()),
        ):
            assert await refused(method(request)) == (grpc.StatusCode.UNAUTHENTICATED, "BAD_CREDENTIALS")


async def test_a_session_is_shown_to_its_owner_and_to_operators_only(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as gateway:
        call, name = await gateway.open("a")
        request = pb.GetSessionRequest(session_id=name)
        found = (await gateway.stub.GetSession(request, metadata=auth("a"))).session
        assert (found.session_id, found.tenant, found.state) == (name, "a", pb.SESSION_STATE_RUNNING)
        assert (await gateway.stub.GetSession(request, metadata=auth("ops"))).session.session_id == name
        denied = grpc.StatusCode.PERMISSION_DENIED
        assert await refused(gateway.stub.GetSession(request, metadata=auth("b"))) == (denied, "NOT_SESSION_OWNER")
        assert await refused(gateway.stub.ListSessions(pb.ListSessionsRequest(), metadata=auth("a"))) == (
            denied,
            "NOT_OPERATOR",
        )
        unknown = pb.GetSessionRequest(session_id="nothing")
        assert await refused(gateway.stub.GetSession(unknown, metadata=auth("a"))) == (
            grpc.StatusCode.NOT_FOUND,
            "NO_SUCH_SESSION",
        )
        listed = await gateway.stub.ListSessions(pb.ListSessionsRequest(), metadata=auth("ops"))
        assert [session.session_id for session in listed.sessions] == [name]
        call.cancel()


async def test_an_operator_ends_a_session_and_its_client_is_told(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as gateway:
        call, name = await gateway.open("a")
        request = pb.EndSessionRequest(session_id=name)
        assert (await refused(gateway.stub.EndSession(request, metadata=auth("a"))))[1] == "NOT_OPERATOR"
        await gateway.stub.EndSession(request, metadata=auth("ops"))
        assert (await last(call)).error.reason == "SESSION_ENDED_BY_OPERATOR"
        assert await call.code() is grpc.StatusCode.ABORTED
        assert (await refused(gateway.stub.EndSession(request, metadata=auth("ops"))))[1] == "NO_SUCH_SESSION"
        assert gateway.backends.is_clean


async def test_a_ban_ends_running_sessions_and_refuses_new_ones(keyed: dict[str, Any], tmp_path: Path) -> None:
    async with running(**keyed) as gateway:
        call, _ = await gateway.open("a")
        other, _ = await gateway.open("b")
        rewrite(tmp_path / "tenants.yaml", "tenants: {a: {banned: true, weight: 2}}  # changed")
        assert gateway.service._identity.refresh()
        gateway.service.apply_policies()
        assert (await last(call)).error.reason == "TENANT_BANNED"
        assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (await last(gateway.stream("a"))).error.reason == "TENANT_BANNED"
        assert gateway.directory.shares == [Share("a", 2)]
        await other.write(pb.StreamVideoRequest(end=pb.End()))
        assert (await last(other)).HasField("session_ended")


async def test_a_look_at_the_files_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve.gateway.service.RELOAD_EVERY_S", 0.0)
    applied, looks = asyncio.Event(), iter([True])

    def look() -> bool:
        if caplog.records:
            return next(looks, False)
        raise KeyError("a secret")

    async with running() as gateway:
        monkeypatch.setattr(gateway.service._identity, "refresh", look)
        monkeypatch.setattr(gateway.service, "apply_policies", applied.set)
        caplog.set_level("ERROR", "ray.serve")
        reloading = asyncio.create_task(gateway.service.keep_reloading())
        async with asyncio.timeout(10):
            await applied.wait()
        reloading.cancel()
    assert "KeyError" in caplog.text
    assert "a secret" not in caplog.text


async def test_a_tenants_longest_session_is_told(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as gateway:
        for key, longest_s in (("a", 5), ("b", 3600)):
            model = await gateway.stub.GetModel(pb.GetModelRequest(), metadata=auth(key))
            assert model.limits.max_duration.seconds == longest_s


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def lines(path: Path, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(60):
        while len(read_lines(path)) < count:  # noqa: ASYNC110  (another thread writes)
            await asyncio.sleep(0.01)
    return read_lines(path)


async def test_every_session_is_billed_once_however_it_ended(keyed: dict[str, Any], tmp_path: Path) -> None:
    async with running(**keyed) as gateway:
        call, well = await gateway.open("a")
        await call.write(pb.StreamVideoRequest(end=pb.End()))
        await last(call)
        await lines(tmp_path / "usage.jsonl", 1)
        bad, _ = await gateway.open("b")
        await bad.write(pb.StreamVideoRequest(ack=pb.Ack(chunk_index=99)))
        await last(bad)
        await lines(tmp_path / "usage.jsonl", 2)
        gone, _ = await gateway.open("b")
        gone.cancel()
        records = await lines(tmp_path / "usage.jsonl", 3)
    assert [record["end"] for record in records[:2]] == ["CLIENT", "INVALID_ACK"]
    assert records[2]["end"] in {"CLIENT", "CLIENT_GONE"}, "whether the end of its messages or the cancel comes first"
    assert (records[0]["session_id"], records[0]["tenant"], records[0]["prompt_count"]) == (well, "a", 1)
    assert records[0]["held_s"] > 0


async def test_a_tenants_prompts_are_limited(keyed: dict[str, Any], tmp_path: Path) -> None:
    rewrite(tmp_path / "tenants.yaml", "default: {prompts_per_minute: 3}")
    async with running(**keyed) as gateway:
        gateway.directory.wait_s = 7.0
        call = gateway.stream("a")
        await send_config(call)
        assert (await last(call)).error.reason == "QUOTA_EXCEEDED"
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_prompt_beyond_its_tenants_limit_leaves_the_session_going_on(
    keyed: dict[str, Any], tmp_path: Path
) -> None:
    rewrite(tmp_path / "tenants.yaml", "default: {prompts_per_minute: 3}")
    async with running(**keyed) as gateway:
        call, _ = await gateway.open("a")
        gateway.directory.wait_s = 7.0
        refused = await refusal(call, "snow")
        assert (refused.reason, refused.retry_after.seconds) == ("QUOTA_EXCEEDED", 7)
        assert refused.error_id
        gateway.directory.wait_s = 0.0
        update = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="snow")], prompt_id="again")
        await call.write(pb.StreamVideoRequest(prompt=update))
        await goes_on(call, "again")


async def test_a_session_without_a_valid_config_frees_its_place() -> None:
    limits = {"config_timeout_s": 2.0}  # long enough for those that do send one, on a busy machine
    async with running(gateway={"max_sessions": 1}, limits=limits) as gateway:
        silent = gateway.stream()
        assert (await last(silent)).error.reason == "CLIENT_SILENT"
        wrong = gateway.stream()
        await send_config(wrong, "")
        assert (await last(wrong)).error.reason == "INVALID_PROMPT"
        call, _ = await gateway.open()
        full = gateway.stream()
        assert (await last(full)).error.reason == "NO_SESSION_SLOT"
        call.cancel()


HOOK: dict[str, Any] = {}


def hook(question: Question) -> Verdict:
    HOOK["asked"] = [*HOOK.get("asked", []), question.prompts]
    if "fail" in HOOK:
        raise ValueError(question.prompts)
    return Verdict(not any("forbidden" in text for text in question.prompts), "words")


async def slow_hook(question: Question) -> Verdict:
    await asyncio.get_running_loop().create_future()
    return Verdict(True)


MODERATED = {"hook": f"{__name__}:hook"}


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    HOOK.clear()
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__))


@pytest.mark.usefixtures("importable")
async def test_a_refused_prompt_ends_the_call_before_the_queue_and_has_no_effect_later() -> None:
    async with running(moderation=MODERATED) as gateway:
        call = gateway.stream()
        await send_config(call, "something forbidden")
        error = (await last(call)).error
        assert (error.reason, await call.code()) == ("CONTENT_REFUSED", grpc.StatusCode.INVALID_ARGUMENT)
        assert "forbidden" not in str(error)
        assert "words" in error.status.message
        assert gateway.backends.events == []
        call, _ = await gateway.open()
        refused = await refusal(call, "forbidden, too")
        assert (refused.prompt_id, refused.reason) == ("mine", "CONTENT_REFUSED")
        assert "words" in refused.message
        assert "forbidden" not in str(refused)
        assert not refused.HasField("retry_after")
        await goes_on(call, "prompt-0")
    assert [prompts[0] for prompts in HOOK["asked"]] == ["something forbidden", PROMPT, "forbidden, too"]


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("name", ["hook", "slow_hook"])
@pytest.mark.parametrize("on_failure", ["allow", "refuse"])
async def test_a_hook_that_fails_or_hangs_lets_pass_or_refuses_as_configured(name: str, on_failure: str) -> None:
    HOOK["fail"] = True
    moderation = {"hook": f"{__name__}:{name}", "timeout_s": 0.05, "on_failure": on_failure}
    async with running(moderation=moderation) as gateway:
        if on_failure == "allow":
            call, _ = await gateway.open()
            call.cancel()
        else:
            call = gateway.stream()
            await send_config(call)
            assert (await last(call)).error.reason == "MODERATION_UNAVAILABLE"
            assert await call.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.usefixtures("importable")
async def test_logs_name_the_session_and_never_hold_a_prompt(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "propagate", True)
    set_up(LogConfig(format="json"))
    caplog.set_level(logging.DEBUG, "ray.serve")
    async with running(moderation=MODERATED) as gateway:
        gateway.backends.decode_failures.append(KeyError(PROMPT))
        call = gateway.stream()
        await send_config(call)
        error = (await last(call)).error
        assert error.reason == "UNEXPECTED"
        for text in (PROMPT + " forbidden", PROMPT * 1000, ""):
            call = gateway.stream()
            await send_config(call, text)
            assert (await last(call)).HasField("error")
    assert caplog.records
    assert error.error_id in caplog.text
    assert PROMPT not in caplog.text
    assert "KeyError" in caplog.text
    assert all(getattr(record, "session_id", "") for record in caplog.records if "session" in record.msg)
