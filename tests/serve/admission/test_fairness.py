"""Whose turn it is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission.fairness import FairShares
from serve.messages import Share


def queues(**sessions: int) -> dict[str, list[tuple[float, str]]]:
    """Return so many waiting sessions a tenant; all came at the same time, the names in order."""
    return {tenant: [(0.0, f"{tenant}{number}") for number in range(count)] for tenant, count in sessions.items()}


def shares(**weights: float) -> FairShares:
    fair = FairShares()
    for tenant, weight in weights.items():
        fair.join(Share(tenant, weight), 0.0, is_new=True)
    return fair


def test_tenants_of_equal_weight_take_turns_however_many_sessions_each_brings() -> None:
    order = shares(a=1, b=1).order(queues(a=6, b=2), 0.0, 60.0)
    assert order.ready == ("a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5")


def test_a_weight_of_three_gets_three_of_four() -> None:
    order = shares(a=1, b=3).order(queues(a=100, b=100), 0.0, 60.0)
    assert Counter(name[0] for name in order.ready[:80]) == {"a": 20, "b": 60}


def test_within_a_tenant_the_first_comes_first() -> None:
    waiting = {"a": [(1.0, "z"), (2.0, "y"), (3.0, "x")]}
    assert shares(a=1).order(waiting, 0.0, 60.0).ready == ("z", "y", "x")


def test_tenants_that_have_had_the_same_are_served_as_they_came() -> None:
    waiting = {"a": [(5.0, "late")], "b": [(2.0, "early")]}
    assert shares(a=1, b=1).order(waiting, 0.0, 60.0).ready == ("early", "late")


def test_long_sessions_count_for_what_they_take() -> None:
    fair = shares(a=1, b=1)
    fair.grant("a", "long", 0.0, 60.0)
    fair.started("a", "long", 0.0, 60.0)
    assert fair.order(queues(a=2, b=12), 600.0, 60.0).ready[:10] == tuple(f"b{n}" for n in range(10))


def test_a_session_that_was_charged_too_much_is_settled_at_its_end() -> None:
    fair = shares(a=1, b=1)
    fair.grant("a", "short", 0.0, 60.0)
    fair.grant("b", "other", 0.0, 60.0)
    assert fair.order(queues(a=1, b=1), 0.0, 60.0).ready == ("a0", "b0")
    fair.settle("b", "other", 5.0)
    assert fair.order(queues(a=1, b=1), 5.0, 60.0).ready == ("b0", "a0")


def test_a_session_that_never_began_costs_nothing() -> None:
    fair = shares(a=1, b=1)
    fair.grant("b", "gone", 0.0, 60.0)
    fair.refund("b", "gone")
    assert fair.ledger() == {"a": 0.0, "b": 0.0}


def test_absence_earns_nothing() -> None:
    fair = shares(a=1)
    fair.grant("a", "x", 0.0, 60.0)
    fair.started("a", "x", 0.0, 60.0)
    fair.join(Share("late"), 36_000.0, is_new=True)
    ready = fair.order(queues(a=4, late=4), 36_000.0, 60.0).ready
    assert Counter(name[:-1] for name in ready[:4]) == {"a": 2, "late": 2}


def test_leaving_and_coming_back_does_not_wipe_a_debt() -> None:
    fair = shares(greedy=1, other=10)
    for tenant in ("greedy", "other"):
        fair.grant(tenant, "x", 0.0, 60.0)
        fair.started(tenant, "x", 0.0, 60.0)
    fair.settle("greedy", "x", 600.0)
    fair.part("greedy")
    fair.join(Share("greedy"), 610.0, is_new=True)
    assert fair.ledger()["greedy"] == 600.0


def test_a_tenant_at_its_limit_waits_behind_everybody_else() -> None:
    fair = shares(b=1)
    fair.join(Share("a", max_sessions=2), 0.0, is_new=True)
    fair.grant("a", "running", 0.0, 60.0)
    order = fair.order(queues(a=3, b=2), 0.0, 60.0)
    assert order.ready == ("b0", "a0", "b1")
    assert order.blocked == ("a1", "a2")


def test_a_ledger_can_be_given_back_to_a_new_book() -> None:
    fair = shares(a=1, b=1)
    fair.restore({"a": 50.0, "stranger": 9.0})
    assert fair.ledger() == {"a": 50.0, "b": 0.0}
    fair.restore({"a": 20.0})
    assert fair.ledger()["a"] == 50.0


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 5), min_size=2),
    st.lists(st.integers(1, 300), min_size=200, max_size=200),
    st.integers(1, 4),
)
def test_busy_tenants_get_generator_time_by_weight(
    weights: dict[str, int], lengths: list[int], generators: int
) -> None:
    """Everybody always has sessions waiting; whatever they last, time is shared as the weights say."""
    fair = shares(**weights)
    running: list[tuple[float, str, str, float]] = []  # end, tenant, session, start
    used = dict.fromkeys(weights, 0.0)
    now_s = 0.0
    for number, length in enumerate(lengths):
        while len(running) >= generators:
            running.sort()
            now_s, tenant, session, began = running.pop(0)
            fair.settle(tenant, session, now_s)
            used[tenant] += now_s - began
        waiting = {tenant: [(0.0, f"{tenant}-{number}")] for tenant in weights}
        session = fair.order(waiting, now_s, 150.0).ready[0]
        tenant = session[0]
        fair.grant(tenant, session, now_s, 150.0)
        fair.started(tenant, session, now_s, 150.0)
        running.append((now_s + length, tenant, session, now_s))
    virtual = [used[tenant] / weight for tenant, weight in weights.items()]
    slack_s = 2 * 300.0 * (generators + 1)  # a few sessions' length: what a grant cannot know
    assert max(virtual) - min(virtual) <= slack_s


class Hoarder(FairShares):
    """Never forgets anybody."""

    def _forget(self) -> None:
        return


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 90)), max_size=60), st.integers(1, 4))
def test_whom_the_clock_has_caught_up_with_may_be_forgotten(steps: list[tuple[str, int]], generators: int) -> None:
    """Tenants come for one session and go; the order of those who wait is the one that a full memory gives."""
    books = FairShares(), Hoarder()
    running: list[tuple[str, str]] = []
    now_s = 0.0
    for number, (tenant, length_s) in enumerate(steps):
        now_s += length_s
        held = {name for name, _ in running}
        waiting = {name: [(float(number), f"{name}{number}")] for name in {tenant, "a", "h"}}
        for fair in books:
            for name in sorted(waiting):
                fair.join(Share(name, 1 + "abcdefgh".index(name) % 3), now_s, is_new=name not in held)
        first, second = (fair.order(waiting, now_s, 60.0).ready for fair in books)
        assert first == second
        chosen = first[0][0]
        running.append((chosen, first[0]))
        for fair in books:
            fair.grant(chosen, first[0], now_s, 60.0)
            fair.started(chosen, first[0], now_s, 60.0)
        if len(running) > generators:
            over = running.pop(0)
            for fair in books:
                fair.settle(*over, now_s)
        for fair in books:
            for name in set("abcdefgh") - {name for name, _ in running}:
                fair.part(name)
    assert set(books[0].ledger()) <= set(books[1].ledger())


def test_the_ledger_does_not_grow_with_every_tenant_that_has_ever_come() -> None:
    fair = shares(always=3)
    fair.grant("always", "x", 0.0, 60.0)
    fair.started("always", "x", 0.0, 60.0)
    most = 0
    for number in range(2000):
        now_s, tenant = 60.0 * number, f"t{number}"
        fair.join(Share(tenant), now_s, is_new=True)
        fair.grant(tenant, "y", now_s, 60.0)
        fair.started(tenant, "y", now_s, 60.0)
        fair.settle(tenant, "y", now_s + 60.0)
        fair.part(tenant)
        most = max(most, len(fair.ledger()))
    assert most <= 5, "a minute's lead is caught up with in three"


def test_a_tenant_whose_sessions_wait_is_not_forgotten() -> None:
    fair = shares(a=1, b=1)
    fair.grant("a", "x", 0.0, 60.0)
    fair.settle("a", "x", 600.0)
    fair.join(Share("a"), 600.0, is_new=False)
    assert fair.order(queues(a=1, b=1), 600.0, 60.0).ready == ("b0", "a0")


def test_an_unknown_tenant_holds_nothing() -> None:
    assert FairShares().held("nobody") == 0
    with pytest.raises(KeyError):
        FairShares().settle("nobody", "x", 0.0)
