"""The client's calls beside the stream: a video, the model, sessions; and new sessions for lost ones."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import PromptUpdate, SwitchPolicy, WeightedPrompt
from serve.client import (
    AsyncReconnectingSession,
    AsyncVideoClient,
    Ended,
    Event,
    Frame,
    PromptApplied,
    PromptRefused,
    Reconnecting,
    Retry,
    Started,
    StreamOptions,
    VideoClient,
    VideoServiceError,
)
from serve.errors import Unavailable
from tests.serve.fakes import FakeBackends, simulated
from tests.serve.gateway.test_service import auth, keyed, running
from tests.serve.server import serving, serving_in_background

__all__ = ["keyed"]

AT_ONCE = Retry(max_attempts=2, first_wait_s=0.0, jitter=0.0)
SOON = {"retry_after_s": "0.01"}


async def test_a_video_of_a_given_length_needs_only_reading() -> None:
    async with (
        running() as gateway,
        AsyncVideoClient(f"127.0.0.1:{gateway.port}") as client,
        client.generate(StreamOptions("a fox", frames_per_second=60, seed=1), 0.25) as video,
    ):
        events = [event async for event in video]
    frames = [event for event in events if isinstance(event, Frame)]
    assert [frame.frame_index for frame in frames] == list(range(17))
    assert isinstance(events[-1], Ended)
    assert (events[-1].reason, events[-1].frame_count) == ("COMPLETE", 17)


async def test_a_refused_video_names_its_field() -> None:
    async with (
        running() as gateway,
        AsyncVideoClient(f"127.0.0.1:{gateway.port}") as client,
        client.generate(StreamOptions("a fox", credit_chunks=2), 1) as video,
    ):
        with pytest.raises(VideoServiceError) as caught:
            await anext(video)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "credit_chunks")


async def test_what_may_be_asked_of_the_model_is_told() -> None:
    async with running() as gateway, AsyncVideoClient(f"127.0.0.1:{gateway.port}") as client:
        model = await client.get_model()
    assert (model.model.name, model.sizes[0].height, model.max_credit_chunks) == ("tiny", 64, 8)


async def test_sessions_are_shown_listed_and_ended(keyed: dict[str, Any]) -> None:
    async with running(**keyed) as gateway:
        address = f"127.0.0.1:{gateway.port}"
        async with (
            AsyncVideoClient(address, metadata=auth("a")) as owner,
            AsyncVideoClient(address, metadata=auth("ops")) as operator,
            owner.stream(StreamOptions("a fox")) as session,
        ):
            async for event in session:
                if isinstance(event, Started):
                    name = event.session_id
                if isinstance(event, Frame):
                    break
            info = await owner.get_session(name)
            assert (info.session_id, info.tenant, info.state) == (name, "a", "RUNNING")
            assert info.age_s > 0
            assert 0 < info.gateway_memory_bytes < 1 << 20  # a few small latents and what is not sent yet
            assert [listed.session_id for listed in await operator.list_sessions()] == [name]
            with pytest.raises(VideoServiceError) as caught:
                await owner.end_session(name)
            assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_OPERATOR")
            await operator.end_session(name)
            with pytest.raises(VideoServiceError, match="SESSION_ENDED_BY_OPERATOR") as caught:
                async for _ in session:
                    pass
            assert not caught.value.is_retryable


async def test_the_blocking_client_does_all_of_it() -> None:
    def use(address: str) -> None:
        with VideoClient(address) as client:
            assert client.get_model().model.name == "tiny"
            with client.generate(StreamOptions("a fox", frames_per_second=60), 0.1) as video:
                assert [type(event) for event in video][-1] is Ended
            with client.stream(StreamOptions("a fox")) as session:
                started = next(event for event in session if isinstance(event, Started))
                assert client.get_session(started.session_id).state == "RUNNING"
                assert [info.session_id for info in client.list_sessions()] == [started.session_id]
                client.end_session(started.session_id)
                with pytest.raises(VideoServiceError, match="SESSION_ENDED_BY_OPERATOR"):
                    list(session)

    async with running() as gateway:
        await asyncio.to_thread(use, f"127.0.0.1:{gateway.port}")


async def test_a_lost_session_is_followed_by_one_under_the_prompt_sent_last() -> None:
    backends, events = FakeBackends(), list[Event]()
    options = StreamOptions("a fox", pacing="as_fast_as_possible")
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.keep_streaming(options, AT_ONCE) as session,
    ):
        async for event in session:
            events.append(event)
            lost = any(isinstance(past, Reconnecting) for past in events)
            if isinstance(event, Frame) and event.last_in_chunk and event.chunk_index == 1 and not lost:
                snow = PromptUpdate((WeightedPrompt("snow"),), transition_chunks=2, policy=SwitchPolicy.RECACHE)
                name = await session.update_prompt(snow)
            if isinstance(event, Frame) and event.prompt_id == "prompt-1" and event.last_in_chunk:
                if lost:
                    await session.end()
                elif not backends.decode_failures:
                    backends.decode_failures += [Unavailable("died", metadata=SOON) for _ in range(2)]
    told = [event for event in events if isinstance(event, Reconnecting)]
    assert [(event.attempt, event.wait_s, event.error.reason) for event in told] == [
        (1, 0.01, "GENERATOR_LOST"),
        (2, 0.01, "GENERATOR_LOST"),
    ]
    again = events[events.index(told[1]) :]
    assert next(event for event in again if isinstance(event, PromptApplied)).prompt_id == name
    first = next(event for event in again if isinstance(event, Frame))
    assert (first.frame_index, first.prompt_id) == (0, name)
    assert isinstance(events[-1], Ended)
    assert backends.is_clean


async def test_a_refused_prompt_is_not_what_the_next_session_begins_with() -> None:
    backends, names = FakeBackends(simulated(limits={"max_pending_prompts": 1})), list[str]()
    applied, refused = list[str](), list[str]()
    async with (
        serving(backends) as address,
        AsyncVideoClient(address) as client,
        client.keep_streaming(StreamOptions("a fox", pacing="as_fast_as_possible"), AT_ONCE) as session,
    ):
        async for event in session:
            if isinstance(event, Frame) and event.last_in_chunk and event.chunk_index == 1 and not names:
                backends.encode_gate = asyncio.Event()
                names = [await session.update_prompt(text) for text in ("snow", "rain")]
            if isinstance(event, PromptRefused) and backends.encode_gate is not None:
                refused.append(event.prompt_id)
                backends.decode_failures.append(Unavailable("died", metadata=SOON))
                backends.encode_gate.set()
            if isinstance(event, PromptApplied):
                applied.append(event.prompt_id)
                if refused and event.chunk_index == 0:  # the next session's first
                    await session.end()
    assert refused == names[1:]
    assert applied[-1] == names[0]


async def test_tries_run_out_and_what_cannot_be_helped_is_raised_at_once() -> None:
    failures = [Unavailable("died", metadata=SOON) for _ in range(3)]
    async with serving(FakeBackends(decode_failures=[*failures])) as address, AsyncVideoClient(address) as client:
        async with client.keep_streaming(StreamOptions("a fox"), AT_ONCE) as session:
            with pytest.raises(VideoServiceError, match="GENERATOR_LOST"):
                async for _ in session:
                    pass
        async with client.keep_streaming(StreamOptions("a fox", height=1, width=1), AT_ONCE) as session:
            with pytest.raises(VideoServiceError, match="UNSUPPORTED_RESOLUTION"):
                await anext(session)


def test_the_blocking_client_reconnects() -> None:
    backends = FakeBackends(decode_failures=[Unavailable("died", metadata=SOON)])
    with (
        serving_in_background(backends) as address,
        VideoClient(address) as client,
        client.keep_streaming(StreamOptions("a fox"), AT_ONCE) as session,
    ):
        kinds = []
        for event in session:
            kinds.append(type(event))
            if isinstance(event, Frame):
                session.end()
    assert kinds.count(Reconnecting) == 1
    assert kinds[-1] is Ended


class LostSession:
    """A session that is lost when its first event is asked for, or, if it has one, when its end is."""

    def __init__(self, *events: Event) -> None:
        self._events = list(events)
        self._lost = asyncio.Event()

    async def __anext__(self) -> Event:
        if self._events:
            return self._events.pop()
        if not self._lost.is_set():
            await self._lost.wait()
        raise VideoServiceError(grpc.StatusCode.UNAVAILABLE, "died", reason="GENERATOR_LOST")

    async def end(self) -> None:
        self._lost.set()

    async def close(self) -> None:
        return


def lost_at_once() -> LostSession:
    session = LostSession()
    session._lost.set()
    return session


def following(*sessions: LostSession) -> tuple[AsyncReconnectingSession, list[LostSession]]:
    """Return what goes from one of the sessions to the next after an hour, and those that it has not opened."""
    left = list(sessions)
    open_session: Any = lambda options: left.pop(0)  # noqa: E731
    retry = Retry(first_wait_s=3600.0, max_wait_s=3600.0, jitter=0.0)
    return AsyncReconnectingSession(open_session, StreamOptions("a fox"), retry), left


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_an_end_between_two_sessions_is_the_end(is_awaited: bool) -> None:
    session, left = following(lost_at_once(), lost_at_once())
    assert isinstance(await anext(session), Reconnecting)
    waiting = asyncio.ensure_future(anext(session, None)) if is_awaited else None
    await asyncio.sleep(0)
    await session.end()
    async with asyncio.timeout(10):
        assert await (waiting or anext(session, None)) is None
    assert len(left) == 1


async def test_an_end_that_a_lost_session_does_not_hear_is_the_end() -> None:
    session, left = following(LostSession(Ended("", 0, 0, 0, 0.0)), lost_at_once())
    await anext(session)
    await session.end()
    assert await anext(session, None) is None
    assert len(left) == 1


async def test_waiting_for_the_next_session_may_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, passed_s = asyncio.get_running_loop(), [0.0]
    real_s = loop.time
    monkeypatch.setattr(loop, "time", lambda: real_s() + passed_s[0])
    session, left = following(lost_at_once(), LostSession(Ended("", 0, 0, 0, 0.0)))
    await anext(session)
    for passed_s[0] in (1800.0, 3590.0):  # what the loop's clock is ahead
        waiting = asyncio.ensure_future(anext(session))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert len(left) == 1
    passed_s[0] = 3601.0
    async with asyncio.timeout(10):
        assert isinstance(await anext(session), Ended)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("codec", "h264", "h264_annexb, h264_fmp4"),
        ("pacing", "fast", "realtime, as_fast_as_possible"),
        ("slow_client_policy", "", "lossless, drop_to_latest"),
    ],
)
def test_an_option_that_the_protocol_does_not_have_is_named(field: str, value: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}: got '{value}'; must be one of .*{allowed}"):
        StreamOptions("a fox", **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "reason", "retry_after_s", "attempt", "wait_s"),
    [
        ("UNAVAILABLE", "DECODER_LOST", None, 1, 0.5),
        ("UNAVAILABLE", "DECODER_LOST", None, 3, 2.0),
        ("UNAVAILABLE", "", None, 7, 30.0),
        ("UNAVAILABLE", "GATEWAY_LOST", 2.0, 1, 2.0),
        ("RESOURCE_EXHAUSTED", "NO_SESSION_SLOT", 90.0, 1, 90.0),
        ("ABORTED", "CLIENT_TOO_SLOW", None, 1, 0.5),
        ("ABORTED", "SESSION_ENDED_BY_OPERATOR", None, 1, None),
        ("INVALID_ARGUMENT", "INVALID_PROMPT", None, 1, None),
        ("UNAUTHENTICATED", "BAD_CREDENTIALS", None, 1, None),
        ("UNAVAILABLE", "DECODER_LOST", 1.0, 9, None),
    ],
)
def test_when_to_come_back(
    code: str, reason: str, retry_after_s: float | None, attempt: int, wait_s: float | None
) -> None:
    error = VideoServiceError(grpc.StatusCode[code], "text", reason=reason, retry_after_s=retry_after_s)
    assert Retry(jitter=0.0).wait_s(error, attempt) == wait_s
    jittered = Retry().wait_s(error, attempt)
    assert (jittered is None) if wait_s is None else wait_s <= (jittered or 0.0) <= 1.25 * wait_s
