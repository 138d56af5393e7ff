"""How long a session is waited for, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.config import Limits
from serve.errors import ClientGone
from serve.gateway.patience import Patience
from tests.serve.fakes import Clock

LIMITS = Limits(silence_timeout_s=1000, stall_timeout_s=60, pause_timeout_s=100, max_session_s=3600, ending_notice_s=30)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def patience(clock: Clock, limits: Limits = LIMITS, *, expects_messages: bool = True) -> Patience:
    made = Patience(limits, expects_messages=expects_messages, clock=clock)
    made.started()
    return made


def test_silence_ends_a_session_and_any_message_breaks_it(clock: Clock) -> None:
    session = patience(clock, Limits(silence_timeout_s=30, max_session_s=10_000))
    clock.now_s += 29
    session.heard()
    clock.now_s += 29
    assert session.verdict() is None
    clock.now_s += 1
    with pytest.raises(ClientGone) as caught:
        session.verdict()
    assert caught.value.reason == "CLIENT_SILENT"


def test_a_client_that_only_reads_is_never_silent(clock: Clock) -> None:
    session = patience(clock, Limits(silence_timeout_s=30, max_session_s=10_000), expects_messages=False)
    clock.now_s += 9_000
    assert session.verdict() is None


def test_missing_acks_end_a_session(clock: Clock) -> None:
    session = patience(clock)
    session.credit(left=False)
    clock.now_s += 59
    session.credit(left=False)  # a second chunk without credit does not start the count anew
    assert session.verdict() is None
    clock.now_s += 1
    with pytest.raises(ClientGone) as caught:
        session.verdict()
    assert caught.value.reason == "CLIENT_TOO_SLOW"


def test_an_ack_is_not_owed_during_a_pause(clock: Clock) -> None:
    session = patience(clock)
    session.credit(left=False)
    clock.now_s += 50
    session.pause()
    clock.now_s += 90
    session.resume()
    clock.now_s += 9
    assert session.verdict() is None
    clock.now_s += 1
    with pytest.raises(ClientGone):
        session.verdict()


def test_credit_that_ends_during_a_pause_counts_from_its_end(clock: Clock) -> None:
    session = patience(clock)
    session.pause()
    clock.now_s += 10
    session.credit(left=False)
    clock.now_s += 80
    session.resume()
    clock.now_s += 59
    assert session.verdict() is None


def test_a_pause_ends_a_session(clock: Clock) -> None:
    session = patience(clock)
    session.pause()
    clock.now_s += 99
    session.pause()
    assert session.verdict() is None
    clock.now_s += 1
    assert session.verdict() == pb.END_REASON_PAUSE_TIMEOUT


def test_pausing_again_and_again_without_a_chunk_does_not_help(clock: Clock) -> None:
    session = patience(clock)
    for _ in range(2):
        session.pause()
        clock.now_s += 50
        session.resume()
    assert session.verdict() == pb.END_REASON_PAUSE_TIMEOUT
    session.made_chunk()
    assert session.verdict() is None


def test_the_longest_session_is_warned_of_once_and_then_ends(clock: Clock) -> None:
    session = patience(clock, Limits(silence_timeout_s=9_000, max_session_s=3600, ending_notice_s=30))
    assert session.warning_s() is None
    clock.now_s += 3575
    assert session.warning_s() == 25
    assert session.warning_s() is None
    assert session.verdict() is None
    clock.now_s += 25
    assert session.verdict() == pb.END_REASON_MAX_DURATION


async def test_watching_returns_for_news_and_when_something_is_due(clock: Clock) -> None:
    session = patience(clock)
    watching = asyncio.create_task(session.watch())
    await asyncio.sleep(0)
    assert not watching.done()
    session.pause()
    await watching
    clock.now_s += 100
    await session.watch()  # due already
