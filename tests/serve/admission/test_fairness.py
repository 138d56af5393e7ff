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


def test_an_unknown_tenant_holds_nothing() -> None:
    assert FairShares().held("nobody") == 0
    with pytest.raises(KeyError):
        FairShares().settle("nobody", "x", 0.0)
