"""The demo's rendered configuration on a real cluster of several nodes: streamed from, scaled, rolled, drained."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.client import AsyncVideoClient, AsyncVideoSession, Frame, Started, StreamOptions, VideoServiceError
from serve.deploy.serve_config import to_yaml
from serve.local import free_port
from tests.k8s.conftest import ROOT, containers, of_kind, rendered

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

PATIENCE_S = 90.0
"""For whatever must happen in the end; a busy machine starts a replica slowly."""


class Deployed:
    """A cluster with one node a pool, the most of pools that grow up to two, and the demo on it."""

    def __init__(self, folder: Path) -> None:
        (service,) = of_kind(rendered("overlays/cpu-demo"), "RayService")
        self.values = yaml.safe_load(service["spec"]["serveConfigV2"])
        self._groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        self._folder = folder
        self._dashboard = free_port()
        self.grpc_port = free_port()
        self.values["grpc_options"]["port"] = self.grpc_port
        self.values["http_options"]["port"] = free_port()
        given = {one["name"]: one["value"] for one in containers(service)[-1]["env"] if one["name"] != "HOME"}
        self.environment = {**given, "PYTHONPATH": str(ROOT), "RAY_SERVE_LOG_TO_STDERR": "0"}

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        memory = 128 << 20
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": self._dashboard}
        head["dashboard_agent_listen_port"] = free_port()
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": memory})
        self.nodes: dict[str, list[str]] = {}
        for group in self._groups:
            resources = {name: float(value) for name, value in group["resources"].items()}
            cpus = int(resources.pop("CPU"))
            for _ in range(min(2, group["maxReplicas"])):
                node = self.cluster.add_node(num_cpus=cpus, resources=resources, object_store_memory=memory, wait=False)
                self.nodes.setdefault(group["groupName"], []).append(node.node_id)
        self.cluster.wait_for_nodes(timeout=60)

    def deploy(self) -> None:
        path = self._folder / "serve.yaml"
        path.write_text(to_yaml(self.values))
        serve = Path(sys.executable).with_name("serve")
        dashboard = f"http://127.0.0.1:{self._dashboard}"
        command = [str(serve), "deploy", "--address", dashboard, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def actors(self, name: str) -> list[Any]:
        """Return the live actors of a class, or the replicas of a deployment."""
        from ray.util.state import list_actors

        found = list_actors(address=self.cluster.address, filters=[("state", "=", "ALIVE")], limit=1000)
        return [one for one in found if one.class_name in (name, f"ServeReplica:causal-forcing:{name}")]

    def pools(self, name: str) -> set[str]:
        """Return the pools on whose nodes the live actors of a class are."""
        of_node = {node: pool for pool, nodes in self.nodes.items() for node in nodes}
        return {of_node.get(one.node_id, "head") for one in self.actors(name)}

    def drain(self, node_id: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "causal_forcing.cli", "drain", "--timeout", "240"]
        command += ["--node-id", node_id, "--address", self.cluster.address]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE)

    @asynccontextmanager
    async def session(self, **options: Any) -> Any:
        chosen = {"seed": 1, "pacing": "realtime", **options}
        address = f"127.0.0.1:{self.grpc_port}"
        async with AsyncVideoClient(address) as client, client.stream(StreamOptions("a red circle", **chosen)) as one:
            yield one


async def chunks(session: AsyncVideoSession, count: int) -> Started | None:
    """Read until so many more chunks are complete; return how the session started, if it did meanwhile."""
    started = None
    async with asyncio.timeout(PATIENCE_S):
        async for event in session:
            if isinstance(event, Started):
                started = event
            if isinstance(event, Frame) and event.last_in_chunk:
                count -= 1
                if count == 0:
                    return started
    pytest.fail("the session ended")


async def started(session: AsyncVideoSession) -> Started:
    """Read three chunks of a new session; return how it started."""
    begun = await chunks(session, 3)
    assert begun is not None
    return begun


async def of_the_new_version(deployed: Deployed) -> Started:
    """Open sessions until one is not sent away from the version that is being replaced; return how it started."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                async with deployed.session() as session:
                    return await started(session)
            except VideoServiceError as error:
                if error.reason != "REPLICA_DRAINING":
                    raise


async def until(ask: Any, what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await asyncio.to_thread(ask):  # noqa: ASYNC110  (another process has no event for us)
                await asyncio.sleep(0.5)
    except TimeoutError:
        pytest.fail(f"not in {PATIENCE_S:g} s: {what}")


async def reading(session: AsyncVideoSession, until_done: asyncio.Event) -> int:
    """Read frames until told to stop; return how many chunks came."""
    count = 0
    while not until_done.is_set():
        await chunks(session, 1)
        count += 1
    return count


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployed]:
    one = Deployed(tmp_path)
    for name, value in one.environment.items():
        monkeypatch.setenv(name, value)
    try:
        one.start()
        yield one
    finally:
        one.cluster.shutdown()


async def test_the_demo_is_deployed_streamed_scaled_rolled_and_drained(deployed: Deployed) -> None:
    deployed.deploy()
    await until(lambda: deployed.actors("Gateway") and deployed.actors("Generator"), "the first replicas")

    async with AsyncExitStack() as stack:
        # Up: a second session gets a second generator, on the pool's other node.
        async with deployed.session() as first:
            assert (await started(first)).config.credit_chunks == 2
            second = await stack.enter_async_context(deployed.session())
            await chunks(second, 3)
            homes = {one.node_id for one in deployed.actors("Generator")}
            assert homes == set(deployed.nodes["generator"])
            assert deployed.pools("TextEncoder") == deployed.pools("VaeDecoder") == {"codec"}
            # On the generators' nodes they would end with one that is taken away because it is idle.
            assert deployed.pools("_MailboxActor") == deployed.pools("_AdmissionActor") == {"gateway"}
        # Down: a generator goes, the older one as each has a node of its own, and the second session does not notice.
        done = asyncio.Event()
        reader = asyncio.create_task(reading(second, done))
        await until(lambda: len(deployed.actors("Generator")) == 1, "one generator is stopped")
        # A new version, while the second session streams.
        deployed.values["applications"][0]["args"]["limits"]["default_credit_chunks"] = 3
        deployed.deploy()
        assert (await of_the_new_version(deployed)).config.credit_chunks == 3
        done.set()
        assert await reader > 0
        await chunks(second, 3)  # the old version's session goes on beside the new one's

    await until(lambda: len(deployed.actors("Generator")) == 1, "the old version has gone")
    async with deployed.session() as last:
        assert (await started(last)).config.credit_chunks == 3
        (generator,) = deployed.actors("Generator")
        drain = deployed.drain(generator.node_id)
        await until(lambda: any(o.node_id != generator.node_id for o in deployed.actors("Generator")), "a replacement")
        await chunks(last, 8)
        assert drain.poll() is None, "the drain did not wait for the session"
    output, _ = await asyncio.to_thread(drain.communicate, timeout=PATIENCE_S)
    assert (drain.returncode, output.strip()) == (0, "every replica has ended")
