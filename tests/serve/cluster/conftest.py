"""One real cluster for all tests of this folder: Ray Serve, its gRPC proxy, and the embedded model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from ray.exceptions import RayActorError

from causal_forcing.prompts import PromptUpdate
from causal_forcing.weights.memory import RESERVE_BYTES
from serve.admission.actor import NAMESPACE
from serve.app import APP_NAME, admission_name
from serve.client import AsyncVideoClient, AsyncVideoSession, Event, Frame, StreamOptions, VideoServiceError
from serve.codecs.frames import Pixels
from serve.config import ServiceConfig, load_config
from serve.local import free_port, local_service

SIZE = 32
FAST = "as_fast_as_possible"
PATIENCE_S = 90.0
"""For whatever must happen in the end; a busy machine starts a replica slowly."""


@dataclass(frozen=True)
class Cluster:
    """A running service and what tests do to it.

    Attributes:
        address: Of the gRPC proxy.
        config: What it runs with; the identity is none, so every caller is the operator `local`.
        folder: Where the tenants' file is, and usage records go.
        metrics_url: What Prometheus scrapes.
    """

    address: str
    config: ServiceConfig
    folder: Path
    metrics_url: str = ""

    @asynccontextmanager
    async def session(
        self, prompt: PromptUpdate | str = "a red circle", **options: Any
    ) -> AsyncIterator[AsyncVideoSession]:
        """Open a session of the small size with lossless frames."""
        chosen = {
            "height": SIZE,
            "width": SIZE,
            "seed": 1,
            "codec": "raw_rgb24",
            "pacing": "as_fast_as_possible",
            **options,
        }
        async with AsyncVideoClient(self.address) as client, client.stream(StreamOptions(prompt, **chosen)) as session:
            yield session

    async def counts(self) -> dict[str, int]:
        """Return what admission counts."""
        counts: dict[str, int] = await self._admission.counts.remote()
        return counts

    async def until_free(self) -> None:
        """Return when no session waits or runs and the generator is idle."""
        free = {"waiting": 0, "running": 0, "generators": 1, "idle": 1}
        await eventually(self.counts, lambda counts: free.items() <= counts.items())

    async def until_reachable(self) -> None:
        """Return when the proxy, which was killed, answers again."""

        async def answers() -> bool:
            async with AsyncVideoClient(self.address) as client:
                try:
                    await client.get_model()
                except VideoServiceError:
                    return False
            return True

        await eventually(answers, bool)

    async def serves(self) -> None:
        """Check that a new session gets frames."""
        async with asyncio.timeout(PATIENCE_S), self.session() as session:
            async for event in session:
                if isinstance(event, Frame):
                    break
        await self.until_free()

    async def until_text_is_encoded(self) -> None:
        """Return when a text encoder answers."""
        from ray import serve

        handle: Any = serve.get_deployment_handle("TextEncoder", APP_NAME)

        async def encode() -> object:
            try:
                return await handle.encode.remote("a red circle", self.config.model_key)
            except RayActorError:
                return None

        await eventually(encode, lambda answer: answer is not None)

    def allow(self, policy: str) -> None:
        """Say in the tenants' file what the tenant `local` may do."""
        write_tenants(self.folder, policy)

    def usage(self) -> dict[str, dict[str, Any]]:
        """Return the usage records so far, by session."""
        lines = [line for path in self.folder.glob("usage-*.jsonl") for line in path.read_text().splitlines()]
        return {record["session_id"]: record for record in map(json.loads, lines)}

    def logs_with(self, text: str) -> list[str]:
        """Return the files of all processes' logs and outputs that hold a text."""
        import ray

        logs = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1] / "logs"
        files = [path for path in logs.rglob("*") if path.is_file()]
        assert files
        return [path.name for path in files if text.encode() in path.read_bytes()]

    async def http(self, path: str) -> tuple[int, bytes]:
        """Return the status and the body of an answer of the HTTP port."""
        url = f"http://127.0.0.1:{self.config.http_port}{path}"
        async with aiohttp.ClientSession() as client, client.get(url) as answer:
            return answer.status, await answer.read()

    def kill(self, deployment: str) -> None:
        """Kill the replica of a deployment as a crash would."""
        os.kill(self._process(f"ray::ServeReplica:causal-forcing:{deployment}"), signal.SIGKILL)

    @contextmanager
    def frozen(self, deployment: str) -> Iterator[psutil.Process]:
        """Stop the process of a deployment's replica as a debugger would; whatever happens, it does not stay."""
        process = psutil.Process(self._process(f"ray::ServeReplica:causal-forcing:{deployment}"))
        process.suspend()
        try:
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def kill_proxy(self) -> None:
        """Kill Serve's proxy as a crash would."""
        os.kill(self._process("ray::ProxyActor"), signal.SIGKILL)

    def kill_admission(self) -> None:
        """Kill the admission actor as a crash would."""
        os.kill(self._process("ray::_AdmissionActor"), signal.SIGKILL)

    def end_admission(self) -> None:
        """End the admission actor for good, as it does itself when nobody uses it."""
        import ray

        ray.kill(self._admission)

    @property
    def _admission(self) -> Any:
        import ray

        return ray.get_actor(admission_name(self.config), namespace=NAMESPACE)

    @staticmethod
    def _process(title: str) -> int:
        ours = psutil.Process().children(recursive=True)  # another cluster may run on this machine
        found = [p for p in ours if title_of(p).startswith(title)]
        assert len(found) == 1, f"{len(found)} processes are called {title}"
        return found[0].pid


def title_of(process: psutil.Process) -> str:
    """Return a process's command line; empty when it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def eventually(ask: Callable[[], Any], is_right: Callable[[Any], bool]) -> None:
    """Ask until the answer is right; fail with the last answer when patience ends."""
    answer = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not is_right(answer := await ask()):  # noqa: ASYNC110  (another process has no event for us)
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"still {answer} after {PATIENCE_S:g} s")


async def collect(session: AsyncVideoSession, chunks: int) -> tuple[list[Event], dict[int, list[Pixels]]]:
    """Return a session's events and frames by chunk, up to a number of chunks."""
    events, frames = list[Event](), dict[int, list[Pixels]]()
    async with asyncio.timeout(PATIENCE_S):
        async for event in session:
            events.append(event)
            if isinstance(event, Frame):
                frames.setdefault(event.chunk_index, []).append(event.pixels())
                if event.last_in_chunk and event.chunk_index == chunks - 1:
                    break
    return events, frames


def write_tenants(folder: Path, policy: str) -> Path:
    """Write the tenants' file, all at once: gateways read it whenever they like."""
    new, path = folder / "new.yaml", folder / "tenants.yaml"
    new.write_text(f"tenants: {{local: {policy}}}\n")
    return new.replace(path)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start the service once for all tests."""
    folder, sizes = tmp_path_factory.mktemp("operator"), [[SIZE, SIZE], [64, 64]]
    enough = load_config(None, sizes=sizes).generator_memory().total_bytes + RESERVE_BYTES
    config = load_config(
        None,
        sizes=sizes,
        grpc_port=free_port(),
        http_port=free_port(),
        generator={"silence_timeout_s": 5, "memory_bytes": enough},
        identity={"tenants_file": str(write_tenants(folder, "{}"))},
        usage={"file": str(folder / "usage-{process}.jsonl")},
        text_encoder={"silence_timeout_s": 5},
        vae_decoder={"silence_timeout_s": 5},
        limits={"silence_timeout_s": 20, "stall_timeout_s": 20, "max_queued_sessions": 2},
        observability={
            "price_per_replica_hour": {"generator": 2.5},
            "tracing": {"endpoint": f"127.0.0.1:{free_port()}", "sample_ratio": 1e-9},  # who asks for it, is traced
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with local_service(config) as service:
            yield Cluster(service.address, config, folder, service.metrics_url)
