"""How many generators are wanted, and what Serve is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

import serve.autoscaling as autoscaling
from serve.admission.book import SETTLE_S, AdmissionBook
from serve.admission.fleet import stop_order
from serve.app import build
from serve.autoscaling import GeneratorPolicy, wanted_replicas
from serve.config import load_config
from serve.messages import GeneratorDemand, Ticket

NODE = {"a": "n", "b": "n", "c": "n", "d": "n"}

# waiting, sessions of running generators (oldest first), target, sessions per replica, spare -> wanted
TABLE = [
    ("nothing to do", 0, "", 0, 1, 0, 0),
    ("from zero", 1, "", 0, 1, 0, 1),
    ("from zero, many", 5, "", 0, 2, 0, 3),
    ("spare from zero", 0, "", 0, 1, 2, 2),
    ("one waits, one runs", 1, "1", 1, 1, 0, 2),
    ("one is starting for it", 1, "1", 2, 1, 0, 2),
    ("spare is there", 0, "10", 2, 1, 1, 2),
    ("spare was taken", 0, "11", 2, 1, 1, 3),
    ("idle newest may go", 0, "100", 3, 1, 0, 1),
    ("newest is busy, idle ones before it stay", 0, "001", 3, 1, 0, 3),
    ("one idle after the newest busy one", 0, "0010", 4, 1, 0, 3),
    ("all idle", 0, "000", 3, 1, 0, 0),
    ("what is starting may go, whoever is busy", 0, "01", 4, 1, 0, 2),
    ("places of one replica", 0, "31", 2, 4, 0, 2),
    ("places of one replica, newest idle", 0, "30", 2, 4, 0, 1),
    ("spare places", 0, "30", 2, 4, 1, 1),
    ("more spare places than one replica has", 0, "30", 2, 4, 2, 2),
]


@pytest.mark.parametrize(
    ("waiting", "sessions", "target", "each", "spare", "wanted"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_wanted_replicas(waiting: int, sessions: str, target: int, each: int, spare: int, wanted: int) -> None:
    running = "abcd"[: len(sessions)]
    demand = GeneratorDemand(waiting, dict(zip(running, map(int, sessions), strict=True)), NODE)
    assert wanted_replicas(demand, running, target, each, spare) == wanted


def test_a_generator_that_admission_does_not_know_is_taken_for_busy() -> None:
    assert wanted_replicas(GeneratorDemand(0, {"a": 0}, NODE), "ab", 2, 1, 0) == 2


def test_a_generator_that_is_stopping_is_not_counted() -> None:
    book = AdmissionBook(10, 0.0)
    for name in "ab":
        book.report(name, 1, [f"of {name}"], SETTLE_S)
    assert wanted_replicas(book.demand("ab"), "ab", 2, 1, 0) == 2
    demand = book.demand("a")  # Serve stops b, although it is busy
    assert demand.held == {"a": 1}
    assert wanted_replicas(demand, "a", 1, 1, 0) == 1
    book.report("b", 1, [], SETTLE_S)
    assert not book.enqueue(Ticket("s", "gateway", 0.0), SETTLE_S).replica_id, "b must get no other session"
    book.demand("ab")
    book.assign(SETTLE_S)
    assert book.place("s", SETTLE_S).replica_id == "b", "Serve kept it after all"


def test_a_generator_that_has_just_started_is_granted_before_serve_has_named_it() -> None:
    book = AdmissionBook(10, 0.0)
    book.report("new", 1, [], SETTLE_S)
    book.demand([])
    assert book.enqueue(Ticket("s", "gateway", 0.0), SETTLE_S).replica_id == "new"


def test_places_without_the_memory_for_who_waits_are_as_good_as_taken() -> None:
    book = AdmissionBook(10, 0.0)
    book.report("a", 4, ["s0"], SETTLE_S, budget_bytes=100)
    book.enqueue(Ticket("s1", "gateway", 1.0, nbytes=90), SETTLE_S)
    assert wanted_replicas(book.demand("a"), "a", 1, 4, 0) == 1, "it fits"
    assert not book.enqueue(Ticket("s2", "gateway", 2.0, nbytes=20), SETTLE_S).replica_id
    assert book.demand("a") == GeneratorDemand(1, {"a": 4}, {"a": ""})
    assert wanted_replicas(book.demand("a"), "a", 1, 4, 0) == 2
    book.report("b", 4, [], SETTLE_S, budget_bytes=100)
    assert book.place("s2", SETTLE_S).replica_id == "b"
    assert book.demand("ab").held == {"a": 2, "b": 1}


def test_replicas_are_stopped_node_by_node_the_smallest_first_and_newest_first_on_each() -> None:
    nodes = {"a": "big", "b": "small", "c": "big", "d": "big", "e": "small"}
    assert stop_order("abcde", nodes) == ["e", "b", "d", "c", "a"]
    assert stop_order("abc", {}) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "nodes",
    [
        {"a": "big", "b": "small", "c": "big", "d": "big", "e": "small"},
        {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"},
        {"a": "1", "b": "1", "c": "1", "d": "1", "e": "1"},
        {"a": "2", "b": "1", "c": "2", "d": "1", "e": "3"},
    ],
    ids=["two nodes", "one each", "one node", "equally many"],
)
def test_the_installed_serve_stops_in_this_order(nodes: dict[str, str]) -> None:
    """What :func:`stop_order` says, asked of Serve's scheduler itself."""
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.deployment_scheduler import DeploymentScheduler

    deployment = DeploymentID("Generator", "app")
    no_labels = SimpleNamespace(get_node_labels=lambda node: {})
    scheduler = DeploymentScheduler(no_labels, head_node_id="head", create_placement_group_fn=lambda: None)
    scheduler._deployments[deployment] = SimpleNamespace(label_selector=None, bundle_label_selector=None)
    for name, node in nodes.items():
        scheduler._running_replicas[deployment][ReplicaID(name, deployment)] = node
    stopped = [
        {replica.unique_id for replica in scheduler._get_replicas_to_stop(deployment, count)} for count in range(1, 6)
    ]
    ours = stop_order("abcde", nodes)
    assert stopped == [set(ours[:count]) for count in range(1, 6)]


@pytest.mark.parametrize(("nodes", "granted"), [("123", "cba"), ("111", "abc"), ("112", "abc")])
def test_sessions_go_where_serve_would_stop_last(nodes: str, granted: str) -> None:
    """So that what is idle is first in Serve's order, and can be stopped while sessions last."""
    book = AdmissionBook(10, 0.0)
    for name, node in zip("abc", nodes, strict=True):
        book.report(name, 1, [], SETTLE_S, node_id=node)
    demand = book.demand("abc")
    places = [book.enqueue(Ticket(f"s{n}", "gateway", float(n)), SETTLE_S) for n in range(3)]
    assert [place.replica_id for place in places] == list(granted)
    busy = {**demand.held, granted[0]: 1}
    assert wanted_replicas(GeneratorDemand(0, busy, demand.nodes), "abc", 3, 1, 0) == 1


class Admission:
    """An admission actor that answers when it is let, or is dead."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.answers: list[GeneratorDemand | Exception] = []
        self.demand = SimpleNamespace(remote=self._demand)

    async def _demand(self, running: list[str]) -> GeneratorDemand:
        self.asked.append(running)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def context(running: str, target: int) -> Any:
    replicas = [SimpleNamespace(unique_id=name) for name in running]
    return SimpleNamespace(running_replicas=replicas, target_num_replicas=target)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(autoscaling.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


async def test_the_policy_answers_from_the_last_poll_and_never_waits(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    admission = Admission()
    monkeypatch.setattr(autoscaling, "find", lambda name: admission)
    policy = GeneratorPolicy("admission-1", 1, 0)
    admission.answers = [GeneratorDemand(2, {}), GeneratorDemand(0, {"a": 1, "b": 0}, NODE)]
    assert policy(context("", 0)) == (0, {}), "nothing is known yet"
    await settle()
    assert policy(context("", 0)) == (2, {})
    clock(autoscaling.POLL_EVERY_S)
    assert policy(context("ab", 2)) == (2, {})
    await settle()
    assert policy(context("ab", 2)) == (1, {})
    assert admission.asked == [[], ["a", "b"]]


async def test_without_admission_nothing_changes_and_the_next_one_is_found(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    dead, alive = Admission(), Admission()
    dead.answers = [GeneratorDemand(0, {"a": 0}, NODE), RayActorError()]
    alive.answers = [GeneratorDemand(0, {"a": 1}, NODE)]
    actors: list[Any] = [dead, ValueError("no actor of that name"), alive]

    def find(name: str) -> Any:
        found = actors.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(autoscaling, "find", find)
    policy = GeneratorPolicy("admission-1", 1, 0)
    wanted = []
    for _ in range(5):
        wanted.append(policy(context("a", 1))[0])
        await settle()
        clock(autoscaling.STALE_S + 1)
    assert wanted == [1] * 5
    assert actors == []


def test_serve_is_given_what_the_configuration_says() -> None:
    config = load_config(
        None,
        engine="simulated",
        limits={"max_session_s": 100},
        generator={"sessions_per_replica": 3, "autoscaling": {"min_replicas": 0, "max_replicas": 5}},
        vae_decoder={"autoscaling": {"max_replicas": 4, "target_calls": 1.5}},
        text_encoder={"replicas": 2},
        gateway={"max_sessions": 30, "autoscaling": {"max_replicas": 6, "target_sessions": 9}},
    )
    gateway = build(config)._bound_deployment
    others = {bound.name: bound for bound in (b._bound_deployment for b in gateway.init_args[2:5])}
    scaling = {
        deployment.name: deployment._deployment_config.autoscaling_config for deployment in (gateway, *others.values())
    }
    assert scaling["TextEncoder"] is None
    assert others["TextEncoder"].num_replicas == 2
    limits = {name: (s.min_replicas, s.max_replicas, s.target_ongoing_requests) for name, s in scaling.items() if s}
    assert limits == {"Generator": (0, 5, 3), "VaeDecoder": (1, 4, 1.5), "Gateway": (1, 6, 9)}
    assert scaling["Generator"].policy.get_policy().__name__ == "GeneratorPolicy"
    assert others["Generator"].max_ongoing_requests == 3
    assert gateway.max_ongoing_requests > 30
    surge = {deployment.name: deployment._deployment_config.max_surge_percent for deployment in others.values()}
    assert surge == {"TextEncoder": 1, "Generator": 0, "VaeDecoder": 1}, "no session may be without a decoder"
    assert gateway._deployment_config.max_surge_percent == 0, "new sessions wait for the new one"
    for deployment in (gateway, *others.values()):
        assert deployment._deployment_config.graceful_shutdown_timeout_s > 100, "a session may last this long"
