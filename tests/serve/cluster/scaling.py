"""What happens to sessions while generators come and go, in a cluster of its own; prints what was seen as JSON.

It is a program because a process can have one Ray cluster, and the tests of this folder share another one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.api import _run

from serve.admission.actor import NAMESPACE
from serve.app import APP_NAME, admission_name, build
from serve.client import AsyncVideoClient, AsyncVideoSession, Ended, Frame, Queued, StreamOptions, VideoServiceError
from serve.config import ServiceConfig, load_config
from serve.local import free_port, local_service
from tests.serve.cluster.crowd import visit_at_once

PATIENCE_S = 120.0
DOWNSCALE_S = 0.5
CROWD = 16
"""Sessions that come at once, two of which can run."""


def configuration(grpc_port: int, http_port: int, **more: Any) -> ServiceConfig:
    return load_config(
        None,
        engine="simulated",
        simulated={"chunk_ms": 40},
        grpc_port=grpc_port,
        http_port=http_port,
        generator={"autoscaling": {"min_replicas": 0, "max_replicas": 2, "downscale_delay_s": DOWNSCALE_S}},
        **more,
    )


class Watch:
    """Asks Serve and admission how things stand."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config

    def generators(self) -> dict[str, int]:
        """Return the number of generator replicas in each state."""
        return self.replicas("Generator")

    def replicas(self, deployment: str) -> dict[str, int]:
        """Return the number of a deployment's replicas in each state."""
        states = serve.status().applications[APP_NAME].deployments[deployment].replica_states
        return {getattr(state, "value", str(state)): count for state, count in states.items()}

    async def counts(self) -> dict[str, int]:
        actor: Any = ray.get_actor(admission_name(self.config), namespace=NAMESPACE)
        counts: dict[str, int] = await actor.counts.remote()
        return counts

    async def until(self, what: str, is_right: Callable[[dict[str, int], dict[str, int]], bool]) -> None:
        """Return when generators and counts are right."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_right(states := self.generators(), counts := await self.counts()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: still {states}, {counts}")
            await asyncio.sleep(0.05)


@asynccontextmanager
async def session(address: str) -> AsyncIterator[AsyncVideoSession]:
    async with AsyncVideoClient(address) as client, client.stream(StreamOptions("a fox", seed=1)) as stream:
        yield stream


async def read(stream: AsyncVideoSession, chunks: int) -> dict[str, Any]:
    """Read some more chunks; say what came before them."""
    start, queued, seen = time.perf_counter(), 0, 0
    async for event in stream:
        queued += isinstance(event, Queued)
        if isinstance(event, Frame) and event.last_in_chunk:
            seen += 1
            if seen == chunks:
                break
    return {"queued": queued, "chunks": seen, "seconds": round(time.perf_counter() - start, 2)}


async def how_it_ends(stream: AsyncVideoSession) -> list[str]:
    """Return the code and the reason that a session ends with."""
    try:
        async for _ in stream:
            pass
    except VideoServiceError as error:
        return [error.code.name, error.reason]
    return []


async def scale(address: str, watch: Watch, redeploy: Callable[..., ServiceConfig]) -> dict[str, Any]:
    """Go from no generator to two and back, then replace one under a session, and last the model."""
    seen: dict[str, Any] = {}
    await watch.until("no generator without sessions", lambda states, _: not states)
    async with AsyncExitStack() as stack:
        older = await stack.enter_async_context(session(address))
        seen["from_zero"] = await read(older, 2)
        newer = await stack.enter_async_context(session(address))
        seen["second"] = await read(newer, 2)
        seen["generators_for_two"] = watch.generators()
        await older.end()
        await watch.until("the older one is idle", lambda _, counts: counts["idle"] == 1)
        low = []
        for _ in range(int(6 * DOWNSCALE_S / 0.04)):
            await read(newer, 1)
            low.append(watch.generators())
        seen["while_the_newest_is_busy"] = [states for states in low if states != {"RUNNING": 2}]
        await newer.end()
    async with asyncio.timeout(PATIENCE_S):
        seen["crowd"] = await visit_at_once(address, CROWD)
    await watch.until("no generator is left", lambda states, counts: not states and counts["generators"] == 0)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(session(address))
        await read(running, 2)
        other = await stack.enter_async_context(session(address))
        await read(other, 2)
        waiting = await stack.enter_async_context(session(address))  # both generators are taken
        seen["waiting"] = type(await anext(waiting)).__name__
        after = Watch(redeploy(limits={"max_queued_sessions": 7}))
        sent_away = asyncio.create_task(how_it_ends(waiting))
        await watch.until("the old generators drain", lambda states, _: states.get("STOPPING", 0) == 2)
        seen["while_draining"] = await read(running, 30)
        await other.end()
        seen["sent_away"] = await sent_away
        both = {"RUNNING": 1, "STOPPING": 1}
        await watch.until("a new gateway beside the old one", lambda *_: watch.replicas("Gateway") == both)
        async with session(address) as fresh:
            seen["after_redeploy"] = await read(fresh, 2)
            seen["still_running"] = await read(running, 2)
        await running.end()
        seen["ended_well"] = [isinstance(event, Ended) async for event in running][-1]
    await after.until("the old generator is gone", lambda states, counts: not states and not counts["running"])
    async with session(address) as running:
        await read(running, 2)
        redeploy(vae="lightvae")
        seen["of_another_model"] = await how_it_ends(running)
    return seen


def main() -> None:
    ports = free_port(), free_port()
    config = configuration(*ports)

    def redeploy(**fields: Any) -> ServiceConfig:
        changed = configuration(*ports, **fields)
        _run(build(changed), _blocking=False, name=APP_NAME, route_prefix="/")
        return changed

    with local_service(config) as service:
        print(json.dumps(asyncio.run(scale(service.address, Watch(config), redeploy))))


if __name__ == "__main__":
    main()
