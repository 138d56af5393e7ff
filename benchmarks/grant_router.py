"""How long a call takes to reach the one idle replica of many: Serve's router against a grant that names the replica.

    python benchmarks/grant_router.py                  fake replicas behind the real router classes, 64 of them
    python benchmarks/grant_router.py --real 8         the same over real Serve replicas (about 2 s each to start)

Cases: one replica of N is idle (the call is for it); the named replica was just killed while another one is idle; the
named one was just killed and nobody is idle, in which case the call must wait without holding up others.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import ray
from _report import quantiles, write
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.utils import generate_request_id
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter

from serve.router import PreferredReplicaRouter

DEPLOYMENT = DeploymentID("Generator", "app")
PROBE_S = 0.0015
GIVE_UP_S = 25.0


@dataclass(frozen=True)
class Grant:
    """What a lease call carries: the replica it should go to."""

    replica_id: str


class FakeReplica:
    """Answers probes like a replica with room for one call."""

    max_ongoing_requests = 1
    node_id = "node"
    availability_zone = None
    multiplexed_model_ids: frozenset[str] = frozenset()

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.busy = True
        self.dead = False

    async def get_queue_len(self, *, deadline_s: float) -> int:  # noqa: ARG002  (Serve's signature)
        """Return the number of calls under way, after a probe's round trip."""
        await asyncio.sleep(PROBE_S)
        if self.dead:
            raise ActorDiedError
        return int(self.busy)


def make_router(kind: type[RequestRouter], replicas: list[FakeReplica]) -> RequestRouter:
    """Return a router that knows the replicas, as a gateway that has run for a while does."""
    router = kind(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    router.initialize_state()
    router.update_replicas(replicas)
    return router


def request(replica: FakeReplica | None) -> PendingRequest:
    """Return a lease call that names a replica, or none."""
    metadata = RequestMetadata(request_id=generate_request_id(), internal_request_id=generate_request_id())
    grant = Grant(replica.replica_id.unique_id if replica else "")
    return PendingRequest(args=[grant], kwargs={}, metadata=metadata)


async def route(router: RequestRouter, call: PendingRequest) -> float:
    """Return the seconds until the call has a replica; infinity when it has none after 25 s."""
    start = time.perf_counter()
    try:
        async with asyncio.timeout(GIVE_UP_S):
            await router._choose_replica_for_request(call)
    except TimeoutError:
        return float("inf")
    return time.perf_counter() - start


async def one_idle(kind: type[RequestRouter], count: int, seed: int) -> float:
    """Return the routing time with one idle replica of ``count`` while the cache still says that it is busy."""
    replicas = [FakeReplica(f"r{index}") for index in range(count)]
    router = make_router(kind, replicas)
    await asyncio.sleep(0.2)
    idle = random.Random(seed).choice(replicas)
    idle.busy = False
    return await route(router, request(idle))


async def named_killed(count: int, seed: int) -> float:
    """Return the routing time when the named replica is dead and one other is idle."""
    replicas = [FakeReplica(f"r{index}") for index in range(count)]
    victim, idle = random.Random(seed).sample(replicas, 2)
    victim.busy = idle.busy = False
    router = make_router(PreferredReplicaRouter, replicas)
    await asyncio.sleep(0.2)
    victim.dead = True
    router._replica_queue_len_cache.invalidate_key(victim.replica_id)
    return await route(router, request(victim))


async def loop_lags(stop: asyncio.Event) -> AsyncIterator[float]:
    """Yield how late a 5 ms timer of the event loop is."""
    while not stop.is_set():
        start = time.perf_counter()
        await asyncio.sleep(0.005)
        yield time.perf_counter() - start - 0.005


async def killed_and_full(count: int) -> dict[str, object]:
    """Return whether other calls still get through while one waits for a dead replica and nobody is idle."""
    replicas = [FakeReplica(f"r{index}") for index in range(count)]
    router = make_router(PreferredReplicaRouter, replicas)
    await asyncio.sleep(0.2)
    replicas[0].dead = True
    router._replica_queue_len_cache.invalidate_key(replicas[0].replica_id)
    stuck = asyncio.create_task(route(router, request(replicas[0])))
    stop, lags = asyncio.Event(), []

    async def watch() -> None:
        lags.extend([lag async for lag in loop_lags(stop)])

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(1.0)
    waited_while_full = not stuck.done()
    replicas[1].busy = False
    await stuck
    waiting = [asyncio.create_task(route(router, request(replicas[0]))) for _ in range(4)]
    others = []
    for replica in replicas[2:22]:
        replica.busy = False
        others.append(await route(router, request(replica)))
        replica.busy = True
    for replica in replicas[22:26]:
        replica.busy = False
    await asyncio.gather(*waiting)
    stop.set()
    await watcher
    return {
        "waited_while_all_were_busy": waited_while_full,
        "calls_for_others_meanwhile_s": quantiles(others),
        "event_loop_lag_s": quantiles(lags),
    }


async def fakes(count: int, trials: int) -> dict[str, Any]:
    """Run every case over fake replicas."""
    default = await asyncio.gather(*(one_idle(PowerOfTwoChoicesRequestRouter, count, seed) for seed in range(trials)))
    granted = [await one_idle(PreferredReplicaRouter, count, seed) for seed in range(4 * trials)]
    killed = [await named_killed(count, seed) for seed in range(4 * trials)]
    found = [value for value in default if value < float("inf")]
    return {
        "replicas": count,
        "trials": trials,
        "probe_s": PROBE_S,
        "serve_default_one_idle_s": {**quantiles(found), "not_in_25_s": len(default) - len(found)} if found else None,
        "grant_one_idle_s": quantiles(granted),
        "grant_named_killed_s": quantiles(killed),
        "grant_named_killed_and_nobody_idle": await killed_and_full(count),
    }


@serve.deployment(max_ongoing_requests=1, ray_actor_options={"num_cpus": 0}, health_check_period_s=1)
class Holder:
    """A generator that does nothing but say who it is and hold its place."""

    def whoami(self) -> tuple[str, int]:
        """Return the replica's unique id and process."""
        return serve.get_replica_context().replica_id.unique_id, os.getpid()

    async def hold(self, _grant: Grant) -> AsyncIterator[str]:
        """Yield the replica's id, then keep the place until cancelled."""
        yield serve.get_replica_context().replica_id.unique_id
        await asyncio.sleep(3600)


async def first_item(handle: DeploymentHandle, grant: Grant) -> tuple[str, object, float]:
    """Return who took the lease, the lease, and the seconds until its first item."""
    start = time.perf_counter()
    lease = handle.hold.options(stream=True).remote(grant)
    return await anext(aiter(lease)), lease, time.perf_counter() - start


async def real_trials(handle: DeploymentHandle, count: int, trials: int) -> dict[str, object]:
    """Fill all replicas but one by one, and kill named ones."""
    pids: dict[str, int] = {}
    while len(pids) < count:
        name, pid = await handle.whoami.remote()
        pids[name] = pid
    leases = {name: (await first_item(handle, Grant(name)))[1] for name in pids}
    idle_times = []
    for trial in range(trials):
        name = list(leases)[trial % count]
        leases.pop(name).cancel()
        took, lease, seconds = await first_item(handle, Grant(name))
        leases[took] = lease
        idle_times.append(seconds)
    victim, other = list(leases)[:2]
    leases.pop(victim).cancel()
    leases.pop(other).cancel()
    await asyncio.sleep(0.5)
    os.kill(pids[victim], signal.SIGKILL)
    took, _, seconds = await first_item(handle, Grant(victim))
    return {
        "replicas": count,
        "freed_then_named_s": quantiles(idle_times),
        "named_just_killed": {"seconds": round(seconds, 4), "went_to_the_idle_one": took == other},
    }


def real(count: int, trials: int) -> dict[str, object]:
    """Run the cases over real replicas."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        router = RequestRouterConfig(request_router_class=PreferredReplicaRouter)
        app = Holder.options(num_replicas=count, request_router_config=router).bind()
        handle = serve.run(app, name="grants", route_prefix=None)
        return asyncio.run(real_trials(handle, count, trials))
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64, help="fake replicas (default 64)")
    parser.add_argument("--trials", type=int, default=40, help="trials of Serve's default router (40; 0: no fakes)")
    parser.add_argument("--real", type=int, default=0, help="also run over this many real replicas (default none)")
    arguments = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    result: dict[str, Any] = {}
    if arguments.trials:
        result["fake"] = fake = asyncio.run(fakes(arguments.replicas, arguments.trials))
        default, granted = fake["serve_default_one_idle_s"], fake["grant_one_idle_s"]
        value = f"{1e3 * granted['p50']:.1f} ms (Serve's router: {default['p50']:.1f} s)" if default else ""
        measure = f"Call to the one idle replica of {arguments.replicas}, median"
        result["readme"] = [{"measure": measure, "value": value}]
    if arguments.real:
        result["real"] = real(arguments.real, 4 * arguments.real)
    write("grant_router", result)


if __name__ == "__main__":
    main()
