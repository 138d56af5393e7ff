"""The queue, the idle generators, and the grants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_forcing.errors import InvalidRequest, NoCapacity
from serve.admission.book import GATEWAY_SILENT_S, SETTLE_S, AdmissionBook
from serve.admission.fleet import GENERATOR_SILENT_S, PASSED_OVER_S
from serve.messages import QueuePlace, Share, Ticket

NOW = 100.0


def ticket(name: str, arrived_s: float = 0.0, gateway: str = "gw", **fields: Any) -> Ticket:
    return Ticket(name, gateway, arrived_s, **fields)


def of(tenant: str, name: str, arrived_s: float = 0.0, nbytes: int = 0, **share: Any) -> Ticket:
    return Ticket(name, "gw", arrived_s, share=Share(tenant, **share), nbytes=nbytes)


def book(max_queued: int = 10) -> AdmissionBook:
    return AdmissionBook(max_queued, NOW - SETTLE_S)


def test_an_idle_generator_is_granted_at_once() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    assert admission.enqueue(ticket("a"), NOW) == QueuePlace(0, None, "g1")


def test_sessions_wait_in_the_order_they_came() -> None:
    admission = book()
    places = [admission.enqueue(ticket(name, at), NOW) for at, name in enumerate("abc")]
    assert [place.ahead for place in places] == [0, 1, 2]
    admission.report("g1", 1, [], NOW)
    assert admission.places("gw", NOW) == {"a": QueuePlace(0, None, "g1"), "b": QueuePlace(0), "c": QueuePlace(1)}


def test_a_generator_is_granted_once_until_it_reports_its_session_and_is_idle_again() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a", 0), NOW)
    admission.enqueue(ticket("b", 1), NOW)
    admission.report("g1", 1, [], NOW)
    assert admission.place("b", NOW).replica_id == ""
    admission.report("g1", 1, ["a"], NOW)
    admission.confirm("a", "g1", NOW)
    assert admission.place("b", NOW).replica_id == ""
    admission.leave("a", NOW)
    assert admission.place("b", NOW).replica_id == ""
    admission.report("g1", 1, [], NOW)
    assert admission.place("b", NOW).replica_id == "g1"


def test_a_session_that_lost_its_generator_is_served_before_those_that_have_not_begun() -> None:
    admission = book(max_queued=1)
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("new", 0), NOW)
    admission.confirm("new", "g1", NOW)
    admission.enqueue(ticket("waiting", 1), NOW)
    admission.retire("g1")
    admission.requeue(Ticket("new", "gw", 0, is_moving=True), NOW)
    admission.requeue(Ticket("late", "gw", 9, is_moving=True), NOW)
    assert [admission.place(name, NOW).ahead for name in ("new", "late", "waiting")] == [0, 1, 2]
    assert admission.counts()["running"] == 0
    admission.report("g2", 2, [], NOW)
    assert [admission.place(name, NOW).replica_id for name in ("new", "late", "waiting")] == ["g2", "g2", ""]
    admission.refuse("late", "g2", NOW)
    assert admission.place("late", NOW).ahead == 0


def test_a_moving_session_keeps_its_charge_and_its_tenants_place() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(of("t", "a", max_sessions=1), NOW)
    admission.confirm("a", "g1", NOW)
    admission.enqueue(of("t", "b", 1, max_sessions=1), NOW)
    admission.retire("g1")
    admission.requeue(replace(of("t", "a", max_sessions=1), is_moving=True, held_s=7), NOW)
    admission.report("g2", 2, [], NOW)
    assert (admission.place("a", NOW).replica_id, admission.place("b", NOW).replica_id) == ("g2", "")
    admission.confirm("a", "g2", NOW)
    admission.leave("a", NOW + 5)
    assert admission.ledger()["t"] == 5
    assert admission.place("b", NOW).replica_id == "g2"


@pytest.mark.parametrize("queued", [False, True])
def test_a_session_may_be_queued_again_twice(queued: bool) -> None:
    admission = book()
    admission.report("g1", 1, ["other"] if queued else [], NOW)
    admission.enqueue(ticket("a"), NOW)
    moving = ticket("a", is_moving=True)
    for _ in range(2):
        admission.requeue(moving, NOW)
    admission.retire("g1")
    admission.requeue(moving, NOW)
    admission.leave("a", NOW)
    assert (admission.counts()["waiting"], admission.order(NOW).ready) == (0, ())


def test_a_gateways_word_makes_good_that_a_lease_began() -> None:
    admission = book()
    admission.report("g1", 2, [], NOW)
    for name in "ab":
        assert admission.enqueue(ticket(name), NOW).replica_id == "g1"
    told = [ticket("a", replica_id="g1", held_s=3.0), ticket("b")]
    for _ in range(2):
        admission.restore("gw", told, NOW)
        assert {"running": 1, "granted": 1, "waiting": 0}.items() <= admission.counts().items()
    assert admission.place("b", NOW).replica_id == "g1", "it was granted, which its gateway has not heard yet"
    admission.leave("a", NOW)
    assert admission.ledger()["local"] == 3.0


def test_a_gateways_word_makes_good_that_a_generator_was_lost_and_the_next_one_taken() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a"), NOW)
    admission.confirm("a", "g1", NOW)
    admission.enqueue(ticket("b", 1), NOW)
    admission.retire("g1")
    moving = ticket("a", is_moving=True, held_s=5.0)
    for _ in range(2):
        admission.restore("gw", [moving, ticket("b", 1)], NOW)
        assert [admission.place(name, NOW).ahead for name in "ab"] == [0, 1]
    admission.report("g2", 1, [], NOW)
    admission.restore("gw", [moving, ticket("b", 1)], NOW)
    assert admission.place("a", NOW).replica_id == "g2", "it was granted, which its gateway has not heard yet"
    admission.restore("gw", [ticket("a", replica_id="g2", held_s=6.0), ticket("b", 1)], NOW)
    assert {"running": 1, "granted": 0, "waiting": 1}.items() <= admission.counts().items()
    assert set(admission.places("gw", NOW)) == {"b"}


def test_a_session_that_lost_its_generator_is_not_sent_there_again_when_only_its_next_claim_is_heard() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a"), NOW)
    admission.confirm("a", "g1", NOW)
    assert admission.enqueue(ticket("a", is_moving=True), NOW) == QueuePlace(0)


def test_several_sessions_may_share_a_generator() -> None:
    admission = book()
    admission.report("g1", 2, [], NOW)
    places = [admission.enqueue(ticket(name, at), NOW) for at, name in enumerate("abc")]
    assert [place.replica_id for place in places] == ["g1", "g1", ""]


def test_the_queue_has_a_bound_and_says_when_to_come_back() -> None:
    admission = book(max_queued=1)
    admission.report("g1", 1, ["other"], NOW)
    admission.enqueue(ticket("a", 0), NOW)
    with pytest.raises(NoCapacity) as caught:
        admission.enqueue(ticket("b", 1), NOW)
    assert caught.value.reason == "NO_SESSION_SLOT"
    assert float(caught.value.metadata["retry_after_s"]) > 0
    assert admission.counts()["waiting"] == 1


def test_a_bound_of_zero_still_serves_when_there_is_room() -> None:
    admission = book(max_queued=0)
    admission.report("g1", 1, [], NOW)
    assert admission.enqueue(ticket("a"), NOW).replica_id == "g1"


def test_a_session_that_gives_up_frees_its_grant_and_its_place() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    for at, name in enumerate("abc"):
        admission.enqueue(ticket(name, at), NOW)
    admission.leave("b", NOW)
    admission.leave("a", NOW)
    assert admission.place("c", NOW).replica_id == "g1"


def test_a_refused_grant_goes_back_to_its_old_place() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a", 0), NOW)
    admission.enqueue(ticket("b", 1), NOW)
    admission.refuse("a", "g1", NOW)
    assert admission.place("a", NOW) == QueuePlace(0)
    assert admission.place("b", NOW) == QueuePlace(1)
    admission.report("g1", 1, [], NOW)
    assert admission.place("a", NOW).replica_id == "g1"


def test_a_lease_that_landed_elsewhere_is_believed() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a", 0), NOW)
    admission.report("g2", 1, ["a"], NOW)
    admission.confirm("a", "g2", NOW)
    assert admission.enqueue(ticket("b", 1), NOW).replica_id == "g1"


def test_a_silent_generator_gets_nothing() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    later = NOW + GENERATOR_SILENT_S + 1
    admission.expire(later)
    assert admission.enqueue(ticket("a"), later).replica_id == ""


def test_a_silent_gateway_loses_its_claims() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a", 0, "dead"), NOW)
    admission.enqueue(ticket("b", 1, "alive"), NOW)
    later = NOW + GATEWAY_SILENT_S + 1
    admission.seen("alive", later)
    admission.report("g1", 1, [], later)
    admission.expire(later)
    assert admission.places("dead", NOW) == {}
    assert admission.place("b", NOW).replica_id == "g1"


def test_nothing_is_granted_before_running_leases_can_be_known() -> None:
    admission = AdmissionBook(10, NOW)
    admission.report("g1", 1, [], NOW)
    assert admission.enqueue(ticket("a"), NOW).replica_id == ""
    admission.expire(NOW + SETTLE_S)
    assert admission.place("a", NOW).replica_id == "g1"


def test_a_new_book_is_rebuilt_from_gateways_and_generators() -> None:
    admission = AdmissionBook(10, NOW)
    admission.enqueue(ticket("c", 3, "gw2"), NOW)
    running = Ticket("a", "gw1", 1.0, "g1")
    admission.restore("gw1", [running, ticket("b", 2, "gw1")], NOW)
    admission.report("g1", 1, ["a"], NOW)
    admission.report("g2", 1, [], NOW)
    admission.expire(NOW + SETTLE_S)
    assert admission.places("gw1", NOW) == {"b": QueuePlace(0, None, "g2")}
    assert admission.place("c", NOW).ahead == 0
    counts = admission.counts()
    assert [counts[name] for name in ("waiting", "granted", "running", "generators", "idle")] == [1, 1, 1, 2, 0]


def test_a_gateway_that_no_longer_has_a_session_frees_it() -> None:
    admission = book()
    admission.enqueue(ticket("a"), NOW)
    admission.restore("gw", [], NOW)
    assert admission.counts()["waiting"] == 0


def test_the_estimate_comes_from_recent_sessions() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a", 0), NOW)
    admission.confirm("a", "g1", NOW)
    assert admission.enqueue(ticket("b", 1), NOW).estimated_wait_s is None
    admission.leave("a", NOW + 60)
    admission.report("g1", 1, ["other"], NOW + 60)
    assert admission.enqueue(ticket("c", 2), NOW + 60).estimated_wait_s == pytest.approx(120)


def test_places_that_did_not_change_do_not_wake_anybody() -> None:
    admission = book()
    admission.report("g1", 1, ["x"], NOW)
    admission.enqueue(ticket("a"), NOW)
    before = admission.revision
    admission.report("g1", 1, ["x"], NOW)
    admission.expire(NOW)
    assert admission.revision == before


def test_a_tenant_that_comes_later_goes_ahead_of_another_ones_crowd() -> None:
    admission = book()
    admission.report("g1", 1, ["other"], NOW)
    for at in range(3):
        admission.enqueue(of("crowd", f"c{at}", at), NOW)
    before = admission.place("c1", NOW).ahead
    assert admission.enqueue(of("single", "s", 9.0), NOW).ahead == 1
    assert admission.place("c1", NOW).ahead == before + 1, "a place may fall back under the weights of now"
    admission.report("g1", 1, [], NOW)
    admission.report("g2", 1, [], NOW)
    places = admission.places("gw", NOW)
    assert {name for name, place in places.items() if place.replica_id} == {"c0", "s"}


def test_a_heavier_tenant_gets_more_of_the_generators() -> None:
    admission = book(max_queued=100)
    for at in range(20):
        admission.enqueue(of("light", f"l{at}", at, weight=1), NOW)
        admission.enqueue(of("heavy", f"h{at}", at, weight=3), NOW)
    for number in range(8):
        admission.report(f"g{number}", 1, [], NOW)
    granted = [name for name, place in admission.places("gw", NOW).items() if place.replica_id]
    assert sorted(name[0] for name in granted) == ["h"] * 6 + ["l"] * 2


def test_a_tenant_has_no_more_sessions_than_it_may_while_others_go_on() -> None:
    admission = book()
    for number in range(3):
        admission.report(f"g{number}", 1, [], NOW)
    assert admission.enqueue(of("a", "a0", 0, max_sessions=1), NOW).replica_id
    assert admission.enqueue(of("a", "a1", 1, max_sessions=1), NOW).replica_id == ""
    assert admission.counts()["blocked"] == 1
    assert admission.enqueue(of("b", "b0", 2), NOW).replica_id
    admission.leave("a0", NOW)
    admission.report("g0", 1, [], NOW)
    assert admission.place("a1", NOW).replica_id


def test_a_tenants_part_of_the_queue_has_a_bound_of_its_own() -> None:
    admission = book()
    admission.enqueue(of("a", "a0", 0, max_queued=1), NOW)
    with pytest.raises(NoCapacity) as caught:
        admission.enqueue(of("a", "a1", 1, max_queued=1), NOW)
    assert caught.value.reason == "QUOTA_EXCEEDED"
    assert float(caught.value.metadata["retry_after_s"]) > 0
    assert admission.enqueue(of("b", "b0", 2, max_queued=1), NOW).ahead == 1


def test_a_tenant_that_may_not_queue_is_served_or_refused() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    assert admission.enqueue(of("a", "a0", 0, max_queued=0), NOW).replica_id == "g1"
    with pytest.raises(NoCapacity):
        admission.enqueue(of("a", "a1", 1, max_queued=0), NOW)


def test_a_session_goes_where_its_memory_is() -> None:
    admission = book()
    admission.report("g1", 4, [], NOW, budget_bytes=100)
    admission.report("g2", 4, [], NOW, budget_bytes=100)
    replicas = [admission.enqueue(of("a", name, at, nbytes=60), NOW).replica_id for at, name in enumerate("abc")]
    assert replicas == ["g2", "g1", ""]
    assert admission.enqueue(of("a", "small", 4, nbytes=40), NOW).replica_id
    admission.leave("a", NOW)
    assert admission.place("c", NOW).replica_id == "g2"


def test_a_sessions_memory_is_free_when_its_generator_says_so() -> None:
    admission = book()
    admission.report("g1", 4, [], NOW, budget_bytes=100)
    admission.enqueue(of("a", "a0", nbytes=90), NOW)
    admission.report("g1", 4, ["a0"], NOW, budget_bytes=100)
    admission.confirm("a0", "g1", NOW)
    admission.leave("a0", NOW)
    assert admission.enqueue(of("a", "a1", nbytes=90), NOW).replica_id == "", "the generator is still clearing up"
    admission.report("g1", 4, [], NOW, budget_bytes=100)
    assert admission.place("a1", NOW).replica_id == "g1"
    admission.leave("a1", NOW)
    assert not admission._fleet._nbytes


def test_a_session_that_fits_nowhere_is_refused_at_once() -> None:
    admission = book()
    admission.report("g1", 4, [], NOW, budget_bytes=100)
    with pytest.raises(InvalidRequest) as caught:
        admission.enqueue(of("a", "huge", nbytes=101), NOW)
    assert caught.value.reason == "SESSION_TOO_LARGE"
    assert "100 bytes" in caught.value.message
    assert admission.counts()["waiting"] == 0
    admission.report("g2", 4, [], NOW)
    assert admission.enqueue(of("a", "huge", nbytes=101), NOW).replica_id == "g2", "nobody counts there"


def test_a_large_session_is_passed_over_for_a_while_and_then_a_generator_is_kept_for_it() -> None:
    admission = book(max_queued=100)
    admission.report("g1", 4, [], NOW, budget_bytes=100)
    small = [of("a", f"s{n}", n, nbytes=30) for n in range(8)]
    assert all(admission.enqueue(ticket, NOW).replica_id for ticket in small[:2])
    assert admission.enqueue(of("a", "large", 2.5, nbytes=90), NOW).replica_id == ""
    assert admission.enqueue(small[3], NOW).replica_id == "g1", "what fits goes first"
    later = NOW + PASSED_OVER_S
    admission.leave("s0", later)
    assert admission.enqueue(small[4], later).replica_id == "", "now the place is kept"
    admission.leave("s1", later)
    admission.leave("s3", later)
    assert admission.place("large", later).replica_id == "g1"
    admission.leave("large", later)
    assert admission.place("s4", later).replica_id == "g1"


def test_new_shares_reach_sessions_that_wait() -> None:
    admission = book()
    admission.enqueue(of("a", "a0", 0), NOW)
    admission.enqueue(of("b", "b0", 1), NOW)
    for number in range(2):
        admission.report(f"g{number}", 1, [f"x{number}"], NOW)
    before = admission.revision
    admission.restore("gw", [of("a", "a0", 0, max_sessions=0), of("b", "b0", 1)], NOW)
    assert admission.revision > before
    admission.report("g0", 1, [], NOW)
    assert admission.place("b0", NOW).replica_id == "g0"
    assert admission.counts()["blocked"] == 1


def test_what_tenants_have_had_survives_a_new_book() -> None:
    first = book()
    first.report("g1", 1, [], NOW)
    first.enqueue(of("greedy", "x"), NOW)
    first.confirm("x", "g1", NOW)
    first.enqueue(of("greedy", "y", 1), NOW)
    first.enqueue(of("other", "z", 2), NOW)
    first.leave("x", NOW + 500)
    second = book()
    second.restore("gw", [of("greedy", "y", 1), of("other", "z", 2)], NOW, first.ledger())
    second.report("g1", 1, [], NOW)
    assert second.place("z", NOW).replica_id == "g1"
    assert second.place("y", NOW) == QueuePlace(0)


def test_a_restored_lease_counts_from_its_start() -> None:
    admission = AdmissionBook(10, NOW)
    old = ticket("old", replica_id="g1", share=Share("a"), held_s=900.0)
    admission.restore("gw", [old, of("a", "a1", 1), of("b", "b1", 2)], NOW)
    admission.report("g1", 1, ["old"], NOW)
    admission.leave("old", NOW)
    assert admission.ledger()["a"] == pytest.approx(900.0)
    admission.report("g1", 1, [], NOW)
    admission.expire(NOW + SETTLE_S)
    assert admission.place("b1", NOW).replica_id == "g1"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ELRC"), st.integers(0, 7)), max_size=60))
def test_an_idle_generator_never_meets_a_waiting_session_and_places_are_never_given_twice(
    steps: list[tuple[str, int]],
) -> None:
    admission = book(max_queued=100)
    held: dict[str, str] = {}
    for number in range(3):
        admission.report(f"g{number}", 1, [], NOW)
    for time, (action, number) in enumerate(steps):
        name = f"s{number}"
        known = name in admission._tickets
        granted = admission.place(name, NOW).replica_id if known else ""
        if action == "E" and not known:
            admission.enqueue(ticket(name, time), NOW)
        elif action == "L" and known:
            admission.leave(name, NOW)
        elif action == "C" and granted and name not in admission._started_s:
            held[granted] = name
            admission.report(granted, 1, [name], NOW)
            admission.confirm(name, granted, NOW)
        elif action == "R" and number < 3:
            held.pop(f"g{number}", None)
            admission.report(f"g{number}", 1, [], NOW)
        counts = admission.counts()
        assert not (counts["idle"] and counts["waiting"])
        grants = [r for p in admission._fleet.generators.values() for r in p.granted]
        assert len(grants) == len(set(grants))
        assert all(len(p.sessions | p.granted) <= 1 for p in admission._fleet.generators.values())


BUDGETS: dict[str, int | None] = {"g0": 10, "g1": 6, "g2": None}
SIZES = (1, 3, 4, 6, 9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("EEELRC"), st.integers(0, 9)), max_size=60))
def test_memory_is_never_promised_twice_and_never_idle_beside_a_session_that_it_would_hold(
    steps: list[tuple[str, int]],
) -> None:
    admission = book(max_queued=100)
    fleet, running = admission._fleet, dict[str, set[str]]()

    def report(replica_id: str, *sessions: str) -> None:
        running[replica_id] = set(sessions)
        admission.report(replica_id, 3, sessions, NOW, budget_bytes=BUDGETS[replica_id])

    for replica_id in BUDGETS:
        report(replica_id)
    for time, (action, number) in enumerate(steps):
        name = f"s{number}"
        known = admission._tickets.get(name)
        if action == "E" and known is None:
            admission.enqueue(of(f"t{number % 2}", name, time, nbytes=SIZES[number % 5]), NOW)
        elif action == "L" and known is not None:
            admission.leave(name, NOW)
        elif action == "C" and known is not None and known.replica_id and name not in admission._started_s:
            report(known.replica_id, *running[known.replica_id], name)
            admission.confirm(name, known.replica_id, NOW)
        elif action == "R" and number < 3:
            report(f"g{number}", *(s for s in running[f"g{number}"] if s in admission._tickets))
        waiting = [t for t in admission.tickets() if not t.replica_id]
        for replica_id, place in fleet.generators.items():
            used, budget = fleet._used_bytes(place), BUDGETS[replica_id]
            assert place.held <= 3
            assert budget is None or used <= budget
            room = 99 if budget is None else budget - used
            assert not place.free or all(t.nbytes > room for t in waiting), (replica_id, waiting)
