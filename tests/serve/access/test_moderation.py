"""Moderation by an HTTP endpoint, against a real server on this machine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from causal_forcing.errors import InvalidRequest
from serve.access.config import ModerationConfig
from serve.access.moderation import MAX_ANSWER_BYTES, Moderator, Question, load_hook
from serve.errors import Unavailable

QUESTION = Question("session-1", "studio", ("a very private prompt", "another"), b"\xff\xd8 an image")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def asking(handler: Handler, **fields: Any) -> AsyncIterator[Moderator]:
    """Return a moderator that asks an endpoint."""
    app = web.Application()
    app.router.add_post("/verdict", handler)
    async with TestServer(app) as server:
        patient = {"timeout_s": 30, **fields}
        moderator = Moderator(ModerationConfig(url=str(server.make_url("/verdict")), **patient))
        try:
            yield moderator
        finally:
            await moderator.close()


def answering(**answer: Any) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(answer)

    return handler


async def test_the_endpoint_is_told_what_a_hook_is_told() -> None:
    asked = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        return web.json_response({"allowed": True})

    async with asking(handler) as moderator:
        await moderator.check(QUESTION)
        await moderator.check(Question("session-2", "studio", ("a fox",)))
    assert asked == [
        {
            "session_id": "session-1",
            "tenant": "studio",
            "prompts": list(QUESTION.prompts),
            "image_base64": base64.b64encode(QUESTION.image).decode(),
        },
        {"session_id": "session-2", "tenant": "studio", "prompts": ["a fox"], "image_base64": ""},
    ]


@pytest.mark.parametrize(
    ("category", "shown"), [("gore", "(gore)"), ("", "here"), ("a very private prompt!", "here"), (7, "(7)")]
)
async def test_a_refusal_names_its_category_if_it_is_a_word_or_two(category: object, shown: str) -> None:
    async with asking(answering(allowed=False, category=category)) as moderator:
        with pytest.raises(InvalidRequest) as caught:
            await moderator.check(QUESTION)
    assert caught.value.reason == "CONTENT_REFUSED"
    assert caught.value.message.endswith(shown)
    assert "private" not in caught.value.message


async def test_an_answer_may_come_in_pieces() -> None:
    more = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b'{"allowed": fal')
        asyncio.get_running_loop().call_later(0.05, more.set)  # so that the first piece is read by itself
        await more.wait()
        await answer.write(b'se, "category": "gore"}')
        return answer

    async with asking(handler) as moderator:
        with pytest.raises(InvalidRequest, match="gore"):
            await moderator.check(QUESTION)


def saying(body: bytes, status: int = 200, **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers=headers)

    return handler


async def hanging(request: web.Request) -> web.StreamResponse:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def stopping_half_way(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"content-length": "100"})
    await answer.prepare(request)
    await answer.write(b'{"allowed": true')
    assert request.transport is not None
    request.transport.close()
    return answer


WRONG = {
    "an error": saying(b'{"allowed": true}', 500),
    "a redirect": saying(b"", 307, location="/verdict"),
    "not json": saying(b"yes"),
    "nothing": saying(b""),
    "not an object": saying(b"[true]"),
    "no verdict": saying(b'{"category": "gore"}'),
    "not a truth": saying(b'{"allowed": "true"}'),
    "too much": saying(b'{"allowed": true' + b" " * MAX_ANSWER_BYTES + b"}"),
    "half an answer": stopping_half_way,
    "no answer in time": hanging,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
async def test_without_a_right_answer_the_operator_decides(wrong: Handler, caplog: pytest.LogCaptureFixture) -> None:
    timeout_s = 0.1 if wrong is hanging else 30
    async with asking(wrong, timeout_s=timeout_s) as moderator:
        with pytest.raises(Unavailable) as caught:
            await moderator.check(QUESTION)
    assert caught.value.reason == "MODERATION_UNAVAILABLE"
    async with asking(wrong, timeout_s=timeout_s, on_failure="allow") as moderator:
        await moderator.check(QUESTION)
    assert "private" not in caplog.text


async def test_without_an_endpoint_the_operator_decides() -> None:
    nobody = f"http://127.0.0.1:{unused_port()}/"
    with pytest.raises(Unavailable):
        await Moderator(ModerationConfig(url=nobody)).check(QUESTION)
    await Moderator(ModerationConfig(url=nobody, on_failure="allow")).check(QUESTION)


async def test_an_endpoint_that_recovers_is_asked_again() -> None:
    statuses = [503, 200]

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"allowed": True}, status=statuses.pop(0))

    async with asking(handler) as moderator:
        with pytest.raises(Unavailable):
            await moderator.check(QUESTION)
        await moderator.check(QUESTION)


@pytest.mark.parametrize(
    "path", ["no.such.module:check", "serve.access.moderation:nothing", "serve.access.moderation:HOOK_THREADS"]
)
def test_a_hook_that_is_not_there_is_refused_at_the_start(path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_hook(path)
    assert path in caught.value.message
