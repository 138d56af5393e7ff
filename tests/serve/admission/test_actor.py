"""Admission as gateways and generators meet it, with the actor in process, and killed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from causal_forcing.errors import NoCapacity
from serve.access.config import UsageConfig
from serve.admission.actor import _AdmissionActor
from serve.admission.book import GATEWAY_SILENT_S, SETTLE_S
from serve.admission.desk import AdmissionDesk
from serve.admission.directory import LOST_S
from serve.admission.handle import AdmissionHandle
from serve.admission.reporter import Reporter
from serve.errors import Unavailable
from serve.messages import Claim, Progress, QueuePlace, Share

T = TypeVar("T")


class Remote:
    """The actor as Ray hands it out: calls are awaited; while it is down they fail, and it comes back empty.

    Attributes:
        lost: Methods whose next call does not reach the actor, which lives.
    """

    def __init__(self, max_queued: int = 10, usage: UsageConfig | None = None) -> None:
        self._told = (max_queued, "tiny", usage)
        self.calls: set[asyncio.Task[Any]] = set()
        self.lost: set[str] = set()
        self.restart()

    def kill(self, *, for_good: bool = False) -> None:
        self.error = ActorDiedError() if for_good else ActorUnavailableError("restarting", None)
        for call in self.calls:
            call.cancel()

    def restart(self) -> None:
        self.actor: Any = _AdmissionActor(*self._told)
        self.actor._book._settled_s -= SETTLE_S
        self.error: RayActorError | None = None

    def __getattr__(self, name: str) -> Any:
        return RemoteMethod(self, name)


class RemoteMethod:
    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name = remote, name

    async def remote(self, *args: Any) -> Any:
        if self._remote.error is not None:
            raise self._remote.error
        if self._name in self._remote.lost:
            self._remote.lost.discard(self._name)
            raise ActorUnavailableError("lost", None)
        call = asyncio.create_task(getattr(self._remote.actor, self._name)(*args))
        self._remote.calls.add(call)
        try:
            await asyncio.wait([call])
        finally:
            self._remote.calls.discard(call)
        if call.cancelled():
            raise self._remote.error or ActorUnavailableError("died", None)
        return call.result()


@pytest.fixture
async def actor() -> AsyncIterator[Remote]:
    remote = Remote()
    yield remote
    if remote.actor._sweeper is not None:
        remote.actor._sweeper.cancel()


async def next_place(places: AsyncIterator[QueuePlace]) -> QueuePlace:
    async with asyncio.timeout(10):
        return await anext(places)


async def granted(places: AsyncIterator[QueuePlace]) -> str:
    while not (place := await next_place(places)).replica_id:
        pass
    return place.replica_id


async def test_a_waiting_session_is_told_when_a_generator_reports_in(actor: Remote) -> None:
    desk = AdmissionDesk(actor, "gw")
    places = desk.places(Claim("a"))
    assert await next_place(places) == QueuePlace(0)
    generator = Reporter(actor, "g1", capacity=1)
    generator.start()
    assert await granted(places) == "g1"
    await generator.add("a")
    await desk.confirm("a", "g1")
    second = desk.places(Claim("b"))
    assert await next_place(second) == QueuePlace(0)
    await desk.leave("a")
    await generator.remove("a")
    assert await granted(second) == "g1"
    desk.close()


async def test_a_refused_grant_comes_again(actor: Remote) -> None:
    desk, generator = AdmissionDesk(actor, "gw"), Reporter(actor, "g1", capacity=1)
    generator.start()
    places = desk.places(Claim("a"))
    assert await granted(places) == "g1"
    await desk.refuse("a", "g1", gone=False)
    await generator.remove("nothing")  # it reports again, so it can be reached
    assert await granted(places) == "g1"
    desk.close()


async def test_who_waits_with_a_version_that_is_replaced_is_sent_away_unless_a_generator_is_free(
    actor: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.admission.desk.TELL_EVERY_S", 0.01)
    current = [True]
    desk, generator = AdmissionDesk(actor, "gw", lambda: current[0]), Reporter(actor, "g1", capacity=1)
    first, second = desk.places(Claim("a")), desk.places(Claim("b"))
    assert await next_place(first) == await next_place(first) == QueuePlace(0)
    generator.start()
    current[0] = False
    assert await granted(first) == "g1"
    assert await next_place(second) == QueuePlace(0)
    with pytest.raises(Unavailable) as caught:
        await next_place(second)
    assert (caught.value.reason, caught.value.retryable) == ("REPLICA_DRAINING", True)
    desk.close()


async def test_a_full_queue_is_told_to_the_caller_and_forgotten() -> None:
    remote = Remote(max_queued=0)
    desk = AdmissionDesk(remote, "gw")
    with pytest.raises(NoCapacity):
        await next_place(desk.places(Claim("a")))
    await desk.leave("a")
    assert remote.actor._book.counts()["waiting"] == 0
    desk.close()


async def test_after_a_death_the_queue_is_restored_in_order_and_running_sessions_stay(actor: Remote) -> None:
    desk, generator = AdmissionDesk(actor, "gw"), Reporter(actor, "g1", capacity=1)
    generator.start()
    running, first, second = desk.places(Claim("run")), desk.places(Claim("first")), desk.places(Claim("second"))
    assert await granted(running) == "g1"
    await generator.add("run")
    await desk.confirm("run", "g1")
    assert await next_place(first) == QueuePlace(0)
    assert await next_place(second) == QueuePlace(1)
    actor.kill()
    await desk.retire("someone else")  # what is told to a dead actor is lost without harm
    actor.restart()
    async with asyncio.timeout(10):
        while (
            not {"waiting": 2, "running": 1, "generators": 1, "idle": 0}.items() <= actor.actor._book.counts().items()
        ):
            await desk._news.wait()
            await generator.remove("nothing")
    await desk.leave("run")
    await generator.remove("run")
    assert await granted(first) == "g1"
    await generator.add("first")
    await desk.confirm("first", "g1")
    place = await next_place(second)
    assert (place.ahead, place.replica_id) == (0, "")
    desk.close()


async def test_a_gateway_that_was_taken_for_dead_restores_its_claims(actor: Remote) -> None:
    desk = AdmissionDesk(actor, "gw")
    places = desk.places(Claim("a"))
    assert await next_place(places) == QueuePlace(0)
    actor.actor._book._gateways["gw"] -= 2 * GATEWAY_SILENT_S
    actor.actor._book.expire(time.monotonic())
    assert actor.actor._book.counts()["waiting"] == 0
    generator = Reporter(actor, "g1", capacity=1)
    generator.start()
    assert await granted(places) == "g1"
    desk.close()


async def test_a_gateway_without_sessions_keeps_admission_alive(actor: Remote) -> None:
    desk = AdmissionDesk(actor, "gw")
    assert actor.actor._book.is_unused
    desk.start()
    desk.start()
    async with asyncio.timeout(10):
        await desk._news.wait()
    assert not actor.actor._book.is_unused
    desk.close()


async def test_an_actor_that_ended_itself_is_replaced_for_everyone_who_holds_its_handle(
    monkeypatch: pytest.MonkeyPatch, actor: Remote
) -> None:
    monkeypatch.setattr("serve.admission.desk.RETRY_S", 0.0)
    monkeypatch.setattr("serve.admission.reporter.REPORT_EVERY_S", 0.01)
    ended = Remote()
    found = [actor, ended]
    handles = [AdmissionHandle([actor, ended].pop), AdmissionHandle(found.pop)]
    desk, generator = AdmissionDesk(handles[0], "gw"), Reporter(handles[1], "g1", capacity=1)
    ended.kill(for_good=True)
    generator.start()
    assert await granted(desk.places(Claim("a"))) == "g1"
    assert found == []
    desk.close()


async def test_calls_that_meet_an_ended_actor_share_one_look_for_the_next(actor: Remote) -> None:
    ended, looks = Remote(), list[Remote]()

    def connect() -> Remote:
        looks.append(actor if looks else ended)
        return looks[-1]

    handle = AdmissionHandle(connect)
    ended.kill(for_good=True)
    answers = await asyncio.gather(*(handle.counts.remote() for _ in range(5)), return_exceptions=True)
    assert all(isinstance(answer, ActorDiedError) for answer in answers)
    assert looks == [ended, actor]
    assert (await handle.counts.remote())["waiting"] == 0


async def test_an_actor_that_is_being_restarted_keeps_its_handle(actor: Remote) -> None:
    found = [actor]
    handle = AdmissionHandle(found.pop)
    actor.kill()
    with pytest.raises(ActorUnavailableError):
        await handle.counts.remote()
    actor.restart()
    assert (await handle.counts.remote())["waiting"] == 0


async def test_what_a_living_admission_did_not_hear_is_made_good(
    actor: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.admission.actor.SYNC_TIMEOUT_S", 0.01)
    desk = AdmissionDesk(actor, "gw")
    await actor.actor.report("g1", 1, [])
    assert await granted(desk.places(Claim("a", Share("studio", max_sessions=1)))) == "g1"
    actor.lost.add("confirm")
    await desk.confirm("a", "g1")
    await until(desk.sessions, lambda views: views[0].is_running)
    actor.lost.add("leave")
    await desk.leave("a")
    await until(desk.sessions, lambda views: not views)
    await actor.actor.report("g1", 1, [])
    assert await granted(desk.places(Claim("b", Share("studio", max_sessions=1)))) == "g1"
    desk.close()


async def test_a_change_during_a_restore_is_told_with_the_next_one(actor: Remote) -> None:
    desk = AdmissionDesk(actor, "gw")
    places = desk.places(Claim("a", Share("studio")))
    assert await next_place(places) == QueuePlace(0)
    restore = actor.actor.restore

    async def restore_meanwhile(*told: Any) -> None:
        actor.actor.restore = restore
        desk.change_shares(lambda tenant: Share(tenant, max_sessions=0))
        await restore(*told)

    actor.actor.restore = restore_meanwhile
    desk.change_shares(lambda tenant: Share(tenant, weight=7))
    await until(actor.counts.remote, lambda counts: counts["blocked"])
    desk.close()


async def test_joining_waits_for_an_actor_that_is_being_restarted(actor: Remote) -> None:
    actor.kill()
    desk = AdmissionDesk(actor, "gw")
    places = desk.places(Claim("a"))
    joining = asyncio.create_task(next_place(places))
    done, _ = await asyncio.wait([joining], timeout=0.01)
    assert not done
    actor.restart()
    assert await joining == QueuePlace(0)
    desk.close()


async def test_reports_that_cross_are_all_answered(actor: Remote) -> None:
    generator = Reporter(actor, "g1", capacity=4)
    generator.start()
    async with asyncio.timeout(10):
        await asyncio.gather(*(generator.add(name) for name in "abcd"))
        await asyncio.gather(generator.remove("a"), generator.add("e"))
    assert actor.actor._book._fleet.generators["g1"].sessions == set("bcde")


async def test_a_running_session_that_lost_its_generator_gets_the_next_one(actor: Remote) -> None:
    desk = AdmissionDesk(actor, "gw")
    await actor.actor.report("g1", 1, [])
    async with aclosing(desk.places(Claim("a"))) as places:
        assert await granted(places) == "g1"
    await desk.confirm("a", "g1")
    waiting = desk.places(Claim("b"))
    assert not (await next_place(waiting)).replica_id
    await desk.requeue("a", "g1")
    assert actor.actor._book.counts()["generators"] == 0
    async with aclosing(desk.places(Claim("a"))) as places:
        assert not (await next_place(places)).replica_id
        await actor.actor.report("g2", 1, [])
        assert await granted(places) == "g2"
    desk.close()


async def test_a_moving_session_keeps_its_place_when_admission_dies_meanwhile(actor: Remote) -> None:
    desk = AdmissionDesk(actor, "gw")
    await actor.actor.report("g1", 1, [])
    async with aclosing(desk.places(Claim("a"))) as places:
        assert await granted(places) == "g1"
    await desk.confirm("a", "g1")
    waiting = desk.places(Claim("b"))
    await next_place(waiting)
    actor.kill()
    await desk.requeue("a", "g1")
    actor.restart()
    async with aclosing(desk.places(Claim("a"))) as places:
        await next_place(places)
        await actor.actor.restore("gw", list(desk._tickets.values()), {})
        assert [actor.actor._book.place(name, time.monotonic()).ahead for name in "ab"] == [0, 1]
    desk.close()


async def until(ask: Callable[[], Awaitable[T]], is_right: Callable[[T], object]) -> T:
    async with asyncio.timeout(10):
        while not is_right(answer := await ask()):  # noqa: ASYNC110  (the actor has no event for us)
            await asyncio.sleep(0)
    return answer


class Carried:
    """The sessions of a gateway."""

    def __init__(self, **progress: Progress) -> None:
        self._progress = progress
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    def progress(self) -> dict[str, Progress]:
        return self._progress

    def end(self, session_id: str) -> None:
        self.ended.put_nowait(session_id)


def carrying(actor: Remote, name: str, carried: Carried) -> AdmissionDesk:
    desk = AdmissionDesk(actor, name)
    desk.carry(carried)
    return desk


async def test_any_gateway_knows_every_session_and_can_have_it_ended(actor: Remote) -> None:
    carried = Carried(a=Progress(frame_count=9))
    here, there = carrying(actor, "gw1", carried), AdmissionDesk(actor, "gw2")
    assert await next_place(here.places(Claim("a", Share("studio")))) == QueuePlace(0)
    views = await until(there.sessions, lambda views: views[0].progress.frame_count)
    assert (views[0].session_id, views[0].tenant, views[0].is_running) == ("a", "studio", False)
    assert await there.end("a")
    async with asyncio.timeout(10):
        assert await carried.ended.get() == "a"
    assert not await there.end("unheard of")
    here.close()


async def test_after_a_death_every_session_is_known_again(actor: Remote) -> None:
    desk = carrying(actor, "gw", Carried(a=Progress(frame_count=9)))
    places = desk.places(Claim("a", Share("studio")))
    assert await next_place(places) == QueuePlace(0)
    actor.kill()
    actor.restart()
    views = await until(desk.sessions, bool)
    assert views[0].tenant == "studio"
    desk.close()


async def test_prompts_are_counted_by_tenant_over_all_gateways_but_not_without_admission(actor: Remote) -> None:
    desks = [AdmissionDesk(actor, name) for name in ("gw1", "gw2")]
    assert [await desk.spend_prompt("a", 2) for desk in desks] == [0.0, 0.0]
    assert await desks[0].spend_prompt("a", 2) > 0
    actor.kill()
    assert await desks[0].spend_prompt("a", 2) == 0.0


async def test_new_shares_reach_admission(actor: Remote) -> None:
    desk = AdmissionDesk(actor, "gw")
    places = desk.places(Claim("a", Share("studio")))
    assert await next_place(places) == QueuePlace(0)
    desk.change_shares(lambda tenant: Share(tenant, weight=7, max_sessions=0))
    await until(actor.counts.remote, lambda counts: counts["blocked"])
    desk.close()


async def test_the_sessions_of_a_dead_gateway_are_billed_from_what_it_told_last(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    remote = Remote(usage=UsageConfig(file=str(file)))
    desk = carrying(remote, "gw", Carried(a=Progress(frame_count=9)))
    assert await next_place(desk.places(Claim("a", Share("studio")))) == QueuePlace(0)
    await until(desk.sessions, lambda views: views[0].progress.frame_count)
    desk.close()
    admission, now_s = remote.actor, time.monotonic()
    admission._expire(now_s + 2 * GATEWAY_SILENT_S)
    assert not file.exists()
    admission._expire(now_s + 2 * GATEWAY_SILENT_S + LOST_S)
    admission._expire(now_s + 2 * GATEWAY_SILENT_S + 2 * LOST_S)
    record = json.loads(file.read_text())
    assert (record["tenant"], record["frame_count"], record["end"], record["complete"]) == (
        "studio",
        9,
        "GATEWAY_LOST",
        False,
    )
    if admission._sweeper is not None:
        admission._sweeper.cancel()
