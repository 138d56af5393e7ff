"""The queue, the idle generators, and the grants."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_forcing.errors import NoCapacity
from serve.admission import GATEWAY_SILENT_S, GENERATOR_SILENT_S, SETTLE_S, AdmissionBook
from serve.messages import Place, Ticket

NOW = 100.0


def ticket(name: str, arrived_s: float = 0.0, gateway: str = "gw") -> Ticket:
    return Ticket(name, gateway, arrived_s)


def book(max_queued: int = 10) -> AdmissionBook:
    return AdmissionBook(max_queued, NOW - SETTLE_S)


def test_an_idle_generator_is_granted_at_once() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    assert admission.enqueue(ticket("a"), NOW) == Place(0, None, "g1")


def test_sessions_wait_in_the_order_they_came() -> None:
    admission = book()
    places = [admission.enqueue(ticket(name, at), NOW) for at, name in enumerate("abc")]
    assert [place.ahead for place in places] == [0, 1, 2]
    admission.report("g1", 1, [], NOW)
    assert admission.places("gw") == {"a": Place(0, None, "g1"), "b": Place(0), "c": Place(1)}


def test_a_generator_is_granted_once_until_it_reports_its_session_and_is_idle_again() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a", 0), NOW)
    admission.enqueue(ticket("b", 1), NOW)
    admission.report("g1", 1, [], NOW)
    assert admission.place("b").replica_id == ""
    admission.report("g1", 1, ["a"], NOW)
    admission.confirm("a", "g1", NOW)
    assert admission.place("b").replica_id == ""
    admission.leave("a", NOW)
    assert admission.place("b").replica_id == ""
    admission.report("g1", 1, [], NOW)
    assert admission.place("b").replica_id == "g1"


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
    assert admission.place("c").replica_id == "g1"


def test_a_refused_grant_goes_back_to_its_old_place() -> None:
    admission = book()
    admission.report("g1", 1, [], NOW)
    admission.enqueue(ticket("a", 0), NOW)
    admission.enqueue(ticket("b", 1), NOW)
    admission.refuse("a", "g1", NOW)
    assert admission.place("a") == Place(0)
    assert admission.place("b") == Place(1)
    admission.report("g1", 1, [], NOW)
    assert admission.place("a").replica_id == "g1"


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
    assert admission.places("dead") == {}
    assert admission.place("b").replica_id == "g1"


def test_nothing_is_granted_before_running_leases_can_be_known() -> None:
    admission = AdmissionBook(10, NOW)
    admission.report("g1", 1, [], NOW)
    assert admission.enqueue(ticket("a"), NOW).replica_id == ""
    admission.expire(NOW + SETTLE_S)
    assert admission.place("a").replica_id == "g1"


def test_a_new_book_is_rebuilt_from_gateways_and_generators() -> None:
    admission = AdmissionBook(10, NOW)
    admission.enqueue(ticket("c", 3, "gw2"), NOW)
    running = Ticket("a", "gw1", 1.0, "g1")
    admission.restore("gw1", [running, ticket("b", 2, "gw1")], NOW)
    admission.report("g1", 1, ["a"], NOW)
    admission.report("g2", 1, [], NOW)
    admission.expire(NOW + SETTLE_S)
    assert admission.places("gw1") == {"b": Place(0, None, "g2")}
    assert admission.place("c").ahead == 0
    assert admission.counts() == {"waiting": 1, "running": 1, "generators": 2, "idle": 0}


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
        granted = admission.place(name).replica_id if known else ""
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
        grants = [r for p in admission._generators.values() for r in p.granted]
        assert len(grants) == len(set(grants))
        assert all(len(p.sessions | p.granted) <= 1 for p in admission._generators.values())
