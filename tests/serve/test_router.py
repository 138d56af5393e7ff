"""Where a call goes: to the replica it names, and to any other when that one is gone. No choice is ever empty."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from serve.router import PreferredReplicaRouter, wanted_replica

DEPLOYMENT = DeploymentID("Generator", "app")


@dataclass(frozen=True)
class Grant:
    replica_id: str


class FakeReplica:
    """A replica as the router sees it."""

    max_ongoing_requests = 1
    node_id = "node"
    availability_zone = None
    multiplexed_model_ids: frozenset[str] = frozenset()

    def __init__(self, name: str, *, busy: bool = False, dead: bool = False) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.busy, self.dead = busy, dead

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if self.dead:
            raise ActorDiedError
        return int(self.busy)


async def router(replicas: list[FakeReplica], patience_s: float = 60.0) -> PreferredReplicaRouter:
    made = PreferredReplicaRouter(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    made.initialize_state(patience_s=patience_s)
    made.update_replicas(replicas)
    first_look = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*first_look)
    return made


def call(*args: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id="r", internal_request_id=str(id(args)))
    return PendingRequest(args=list(args), kwargs={}, metadata=metadata)


async def chosen(made: PreferredReplicaRouter, request: PendingRequest) -> str:
    async with asyncio.timeout(10):
        replica = await made._choose_replica_for_request(request)
    return str(replica.replica_id.unique_id)


async def test_the_named_replica_is_taken() -> None:
    made = await router([FakeReplica(f"r{number}") for number in range(20)])
    assert {await chosen(made, call(Grant(f"r{number}"))) for number in range(20)} == {f"r{n}" for n in range(20)}


async def test_calls_that_name_nobody_are_spread() -> None:
    made = await router([FakeReplica(f"r{number}") for number in range(4)])
    assert {await chosen(made, call(Grant(""))) for _ in range(60)} == {"r0", "r1", "r2", "r3"}


async def test_a_dead_replica_is_replaced_by_an_idle_one() -> None:
    replicas = [FakeReplica("dead"), FakeReplica("busy", busy=True), FakeReplica("idle")]
    made = await router(replicas)
    replicas[0].dead = True
    made._replica_queue_len_cache.invalidate_key(replicas[0].replica_id)
    assert await chosen(made, call(Grant("dead"))) == "idle"


async def test_an_unknown_replica_is_replaced_by_an_idle_one() -> None:
    made = await router([FakeReplica("busy", busy=True), FakeReplica("idle")])
    assert await chosen(made, call(Grant("never heard of"))) == "idle"


async def test_a_named_replica_that_is_full_is_waited_for() -> None:
    replicas = [FakeReplica("full", busy=True), FakeReplica("idle")]
    made = await router(replicas)
    waiting = asyncio.create_task(chosen(made, call(Grant("full"))))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    replicas[0].busy = False
    assert await waiting == "full"


async def test_patience_ends() -> None:
    made = await router([FakeReplica("full", busy=True), FakeReplica("idle")], patience_s=0.0)
    assert await chosen(made, call(Grant("full"))) == "idle"


async def test_calls_go_on_while_one_waits_for_a_dead_replica() -> None:
    replicas = [FakeReplica("dead"), *(FakeReplica(f"r{number}", busy=True) for number in range(5))]
    made = await router(replicas)
    replicas[0].dead = True
    made._replica_queue_len_cache.invalidate_key(replicas[0].replica_id)
    stuck = asyncio.create_task(chosen(made, call(Grant("dead"))))
    done, _ = await asyncio.wait([stuck], timeout=0.05)
    assert not done
    replicas[1].busy = replicas[2].busy = False
    assert {await stuck, await chosen(made, call(Grant("r1")))} <= {"r0", "r1"}


@pytest.mark.parametrize("wanted", ["r0", "gone", ""])
@pytest.mark.parametrize("patience_s", [0.0, 60.0])
async def test_a_choice_is_never_empty_and_always_asks_for_backoff(wanted: str, patience_s: float) -> None:
    replicas = [FakeReplica("r0", busy=True)]
    made = await router(replicas, patience_s)
    request = call(Grant(wanted))
    ranks = await made.choose_replicas(list(replicas), request)
    assert ranks
    assert all(ranks)
    assert request.routing_context.should_backoff


async def test_what_names_no_replica_goes_anywhere() -> None:
    assert wanted_replica(call()) == ""
    assert wanted_replica(call("text")) == ""
    assert wanted_replica(call(Grant("r1"))) == "r1"


@dataclass(frozen=True)
class Placing:
    loads: dict[str, int]
    replica_id: str = ""


async def test_a_call_for_any_goes_to_the_replica_with_the_least_to_do() -> None:
    made = await router([FakeReplica(f"r{number}") for number in range(4)])
    loads = {"r0": 2, "r1": 1, "r2": 3, "r3": 1}
    assert {await chosen(made, call(Placing(loads))) for _ in range(40)} == {"r1", "r3"}
    assert await chosen(made, call(Placing({"r0": 2, "r1": 1, "r2": 3}))) == "r3"  # new: it has nothing to do


async def test_the_least_loaded_replica_may_have_died() -> None:
    made = await router([FakeReplica("r0"), FakeReplica("r1", dead=True)])
    assert await chosen(made, call(Placing({"r0": 5, "r1": 0}))) == "r0"
