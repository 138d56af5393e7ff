"""A generator whose process is frozen is ended by its gateway; one that only seems so is not."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from serve.mailbox import MailboxRoom
from serve.messages import LeaseStarted, Stop
from serve.silence import SilenceWatch, answers_its_health_check


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
