"""A generator whose process is frozen is ended by its gateway; one that only seems so is not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from serve.mailbox import MailboxRoom
from serve.messages import LeaseStarted, Process, Stop
from serve.silence import MAX_KNOWN, AnswerWatch, SilenceWatch, answers_its_health_check


async def test_a_log_is_unread_when_nobody_waits_at_it() -> None:
    room = MailboxRoom()
    room.open("s")
    assert room.unread(0.0) == ["s"]
    assert room.unread(60.0) == []
    room.put("s", Stop())
    await room.poll("s", 0, 1.0)
    assert room.unread(0.0) == ["s"]
    assert room._logs["s"].readers == 0
    room.close("s")
    assert room.unread(0.0) == []


@pytest.mark.parametrize(("answers", "ended"), [(False, ["g1"]), (True, [])])
async def test_a_silent_generator_is_ended_unless_it_answers(answers: bool, ended: list[str]) -> None:
    asked, done = list[float](), list[LeaseStarted]()

    async def unread(for_s: float) -> list[str]:
        asked.append(for_s)
        return ["s.1", "of a session that waits"]

    async def answer(replica_id: str) -> bool:
        return answers

    watch = SilenceWatch(unread, 10.0, answer, done.append)
    with watch.over("s.1", LeaseStarted("g1", 7, "node")), watch.over("t.1", LeaseStarted("g2")):
        await watch.look()
    assert [lease.replica_id for lease in done] == ended
    assert asked == [10.0]


class Replica:
    """A replica's actor whose health check says what it is told to."""

    def __init__(self, answer: Any) -> None:
        self.check_health = self
        self._answer = answer

    async def remote(self) -> None:
        if self._answer is not None:
            raise self._answer


@pytest.mark.parametrize("answer", [None, ActorDiedError(), TimeoutError()])
async def test_death_and_illness_are_answers(answer: Exception | None) -> None:
    expected = not isinstance(answer, TimeoutError)
    assert await answers_its_health_check(Replica(answer)) is expected


async def test_a_replica_that_is_gone_needs_no_end() -> None:
    assert await answers_its_health_check(None)


@pytest.mark.parametrize(("frozen", "ended"), [({"d2"}, ["d2"]), (set[str](), [])])
async def test_a_call_without_an_answer_has_the_replicas_looked_at(frozen: set[str], ended: list[str]) -> None:
    answer, asked, done = asyncio.get_running_loop().create_future(), list[str](), list[str]()

    async def answers(replica_id: str) -> bool:
        asked.append(replica_id)
        if len(asked) == 4 and not answer.done():
            answer.set_result("frames")
        return replica_id not in frozen

    watch = AnswerWatch(0.01, answers, lambda process: done.append(process.replica_id))
    for name in ("d1", "d2"):
        watch.heard(Process(name, 7, "node"))
    async with asyncio.timeout(20):
        if frozen:
            answer.get_loop().call_later(0.1, answer.set_result, "frames")
        assert await watch.answer(answer) == "frames"
    assert done == ended
    assert asked[:2] == ["d1", "d2"]
    assert asked[2:] == [name for name in asked[2:] if name not in frozen], "what was ended is not asked again"


async def test_an_answer_in_time_and_an_error_pass_and_nobody_is_looked_at() -> None:
    async def answers(_: str) -> bool:
        raise AssertionError("nobody was silent")

    async def fail() -> None:
        raise ValueError("broken")

    async def frames() -> str:
        return "frames"

    watch = AnswerWatch(60.0, answers, lambda _: None)
    assert await watch.answer(frames()) == "frames"
    with pytest.raises(ValueError, match="broken"):
        await watch.answer(fail())


async def test_a_caller_that_leaves_takes_its_call_with_it() -> None:
    begun, left = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    waiting = asyncio.create_task(AnswerWatch(60.0, lambda _: asyncio.sleep(0, True), lambda _: None).answer(call()))
    await begun.wait()
    waiting.cancel()
    async with asyncio.timeout(20):
        await left.wait()


def test_replicas_that_are_long_gone_are_forgotten() -> None:
    watch = AnswerWatch(60.0, lambda _: asyncio.sleep(0, True), lambda _: None)
    for number in range(MAX_KNOWN + 5):
        watch.heard(Process(f"d{number}", number, "node"))
    assert len(watch._known) == MAX_KNOWN
    assert "d4" not in watch._known
