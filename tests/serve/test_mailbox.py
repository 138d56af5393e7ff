"""The log between gateway and generator."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from causal_forcing.errors import NoCapacity, SessionStateError
from serve.config import Limits
from serve.mailbox import MAX_ENTRIES, MailboxLog, MailboxRoom
from serve.messages import Credit, SetPaused, SetPrompt, Stop
from tests.serve.fakes import update


def prompt(name: str) -> SetPrompt:
    return SetPrompt(update(prompt_id=name), (), ())


def test_a_message_stays_until_it_is_acknowledged() -> None:
    log = MailboxLog()
    first, second = log.append(prompt("a")), log.append(prompt("b"))
    assert [seq for seq, _ in log.after(0)] == [first, second]
    assert [seq for seq, _ in log.after(0)] == [first, second]
    assert [seq for seq, _ in log.after(first)] == [second]
    assert log.after(second) == []


def test_pauses_and_credits_between_two_prompts_are_one_of_each() -> None:
    log = MailboxLog()
    for message in (SetPaused(True), Credit(0), SetPaused(False), Credit(1), prompt("a"), SetPaused(True), Credit(2)):
        log.append(message)
    unread = [SetPaused(False), Credit(1), prompt("a"), SetPaused(True), Credit(2)]
    assert [message for _, message in log.after(0)] == unread


def test_credits_replace_each_other_but_never_move_past_a_prompt() -> None:
    log = MailboxLog()
    for message in (Credit(0), Credit(1), prompt("a"), Credit(2), Credit(3)):
        log.append(message)
    assert [message for _, message in log.after(0)] == [Credit(1), prompt("a"), Credit(3)]


def test_sequence_numbers_rise_over_replaced_credits() -> None:
    log = MailboxLog()
    log.append(Credit(0))
    seen = log.after(0)[-1][0]
    log.append(Credit(1))
    assert [message for _, message in log.after(seen)] == [Credit(1)]


def test_a_log_that_nobody_reads_has_a_bound() -> None:
    log = MailboxLog()
    for number in range(MAX_ENTRIES):
        log.append(prompt(str(number)))
    with pytest.raises(NoCapacity):
        log.append(prompt("one more"))


def test_all_that_a_gateway_lets_wait_has_room() -> None:
    log, prompts = MailboxLog(), Limits(max_pending_prompts=1024).max_pending_prompts
    with pytest.raises(ValidationError):
        Limits(max_pending_prompts=prompts + 1)
    for number in range(prompts):
        for message in (prompt(str(number)), Credit(number), SetPaused(True)):
            log.append(message)
    log.append(Stop())
    assert len(log.after(0)) == 3 * prompts + 1


def test_a_reader_of_another_log_is_told() -> None:
    with pytest.raises(SessionStateError) as caught:
        MailboxLog().after(3)
    assert caught.value.reason == "MAILBOX_LOST"


async def test_a_waiting_poll_gets_what_is_written() -> None:
    room = MailboxRoom()
    room.open("s")
    poll = asyncio.create_task(room.poll("s", 0, 10.0))
    await asyncio.sleep(0)
    room.put("s", Stop())
    assert await poll == [(1, Stop())]


async def test_a_poll_without_news_returns_empty_handed() -> None:
    room = MailboxRoom()
    room.open("s")
    assert await room.poll("s", 0, 0.0) == []


async def test_sessions_do_not_see_each_other() -> None:
    room = MailboxRoom()
    room.open("a")
    room.open("b")
    room.put("a", prompt("for a"))
    assert await room.poll("b", 0, 0.0) == []
    assert [message for _, message in await room.poll("a", 0, 0.0)] == [prompt("for a")]


async def test_closing_ends_a_waiting_poll_and_leaves_nothing() -> None:
    room = MailboxRoom()
    room.open("s")
    poll = asyncio.create_task(room.poll("s", 0, 10.0))
    await asyncio.sleep(0)
    room.close("s")
    with pytest.raises(SessionStateError):
        await poll
    assert room.count() == 0


async def test_writing_to_a_session_that_is_over_is_refused() -> None:
    with pytest.raises(SessionStateError):
        MailboxRoom().put("s", Stop())
