"""What the path of a chunk costs: the gateway calls the decoder (ours), or the generator does.

    python benchmarks/gateway_path.py

Prototype deployments with the real gRPC proxy, separate processes and a mailbox actor; nobody computes. A chunk is
0.2 MB of latents and 4 JPEGs of 60 kB; every chunk is acked by the client, and the ack goes on to the generator.
Loads: `single` and `paced` (1 and 4 sessions, a chunk every 101 ms each: added latency, from the generator's yield to
the last frame at the client) and `full` (as fast as two chunks of credit allow: CPU time a chunk, process by
process).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import psutil
import ray
from _report import quantiles, write
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.handle import DeploymentHandle

from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc

LATENTS = 16 * 60 * 104 * 2
FRAMES = 4
FRAME_BYTES = 60_000
CREDIT = 2
MANY = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0}}


@ray.remote(num_cpus=0, max_concurrency=1000)
class Mailbox:
    """Carries each session's last ack from the gateway to the generator."""

    def __init__(self) -> None:
        self._acks: dict[str, int] = {}
        self._news: dict[str, asyncio.Event] = {}

    async def put(self, session: str, ack: int) -> None:
        """Store an ack."""
        self._acks[session] = ack
        self._news.setdefault(session, asyncio.Event()).set()

    async def poll(self, session: str, after: int) -> int:
        """Return the newest ack beyond ``after``."""
        event = self._news.setdefault(session, asyncio.Event())
        while self._acks.get(session, -1) <= after:
            event.clear()
            await event.wait()
        return self._acks[session]


@serve.deployment(**MANY)
class Encoder:
    """Returns an embedding of the full model's size."""

    def encode(self, _text: str) -> np.ndarray:
        """Return ``[512, 4096]`` 16-bit numbers."""
        return np.zeros((512, 4096), np.uint16)

    def pid(self) -> int:
        """Return the replica's process."""
        return os.getpid()


@serve.deployment(**MANY)
class Decoder:
    """Returns encoded frames."""

    def __init__(self) -> None:
        self._frames = [os.urandom(FRAME_BYTES) for _ in range(FRAMES)]

    async def decode(self, _latents: np.ndarray) -> list[bytes]:
        """Return four encoded frames."""
        return self._frames

    def pid(self) -> int:
        """Return the replica's process."""
        return os.getpid()


@serve.deployment(**MANY)
class Generator:
    """Yields chunks within the credit; one process stands for many GPUs."""

    def __init__(self, decoder: DeploymentHandle, decodes: bool) -> None:
        self._decoder = decoder
        self._decodes = decodes
        self._latents = np.random.default_rng(0).integers(0, 255, LATENTS, dtype=np.uint8)

    async def lease(self, session: str, mailbox: Any, chunks: int, chunk_s: float) -> AsyncIterator[Any]:  # noqa: ANN401
        """Yield ``(time, latents or frames)`` a chunk."""
        acked, start = -1, time.perf_counter()
        for index in range(chunks):
            while index > acked + CREDIT:
                acked = await mailbox.poll.remote(session, acked)
            await asyncio.sleep(max(0.0, start + index * chunk_s - time.perf_counter()))
            made = time.time()
            if self._decodes:
                yield made, await self._decoder.decode.remote(self._latents)
            else:
                yield made, self._latents

    def pid(self) -> int:
        """Return the replica's process."""
        return os.getpid()


@serve.deployment(**MANY)
class Gateway:
    """Speaks the protocol; calls the encoder, and the decoder unless the generator does."""

    def __init__(
        self, encoder: DeploymentHandle, generator: DeploymentHandle, decoder: DeploymentHandle, decodes: bool
    ) -> None:
        self._encoder, self._generator, self._decoder, self._decodes = encoder, generator, decoder, decodes
        self._mailbox = Mailbox.remote()

    async def StreamVideo(  # noqa: N802  (the RPC's name)
        self, requests: AsyncIterator[pb.StreamVideoRequest]
    ) -> AsyncIterator[pb.StreamVideoResponse]:
        """Serve one session; seed and credit carry the number of chunks and their time in milliseconds."""
        config = (await anext(requests)).config
        session = os.urandom(8).hex()
        await self._encoder.encode.remote(config.prompt.prompts[0].text)
        pump = asyncio.create_task(self._acks(session, requests))
        lease = self._generator.options(stream=True).lease.remote(
            session, self._mailbox, config.seed, config.credit_chunks / 1000
        )
        index = 0
        async for made, payload in lease:
            frames = payload if self._decodes else await self._decoder.decode.remote(payload)
            for number, data in enumerate(frames):
                frame = pb.VideoFrame(chunk_index=index, data=data, last_in_chunk=number == FRAMES - 1)
                frame.timings.denoise.FromNanoseconds(int(made * 1e9))
                yield pb.StreamVideoResponse(frame=frame)
            index += 1
        pump.cancel()

    async def _acks(self, session: str, requests: AsyncIterator[pb.StreamVideoRequest]) -> None:
        async for message in requests:
            await self._mailbox.put.remote(session, message.ack.chunk_index)

    def pid(self) -> int:
        """Return the replica's process."""
        return os.getpid()


async def one_session(stub: video_pb2_grpc.VideoServiceStub, chunks: int, chunk_ms: int) -> list[float]:
    """Return each chunk's way from the generator to the client in milliseconds."""
    call = stub.StreamVideo()
    config = pb.SessionConfig(seed=chunks, credit_chunks=chunk_ms)
    config.prompt.prompts.add(text="a fox")
    await call.write(pb.StreamVideoRequest(config=config))
    delays = []
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.frame.last_in_chunk:
            delays.append(1e3 * (time.time() - message.frame.timings.denoise.ToNanoseconds() / 1e9))
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # the call has ended
                await call.write(pb.StreamVideoRequest(ack=pb.Ack(chunk_index=message.frame.chunk_index)))
    return delays


def cpu_seconds(pids: dict[str, int]) -> dict[str, float]:
    """Return the CPU time each process has used."""
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}


async def load(port: int, pids: dict[str, int], sessions: int, chunks: int, chunk_ms: int) -> dict[str, Any]:
    """Run some sessions at once; return latency, rate, and CPU milliseconds a chunk."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = video_pb2_grpc.VideoServiceStub(channel)
        await one_session(stub, 10, 0)
        before, start = cpu_seconds(pids), time.perf_counter()
        delays = await asyncio.gather(*(one_session(stub, chunks, chunk_ms) for _ in range(sessions)))
        seconds, after = time.perf_counter() - start, cpu_seconds(pids)
    total = sessions * chunks
    spent = {name: round(1e3 * (after[name] - before[name]) / total, 3) for name in pids}
    return {
        "sessions": sessions,
        "chunks_per_s": round(total / seconds, 1),
        "latency_ms": quantiles([delay for session in delays for delay in session[2:]]),
        "cpu_ms_per_chunk": spent,
        "cpu_ms_per_chunk_total": round(sum(spent.values()), 3),
        "gateway_chunks_per_core_s": round(1e3 / spent["gateway"], 1),
    }


def find_proxy() -> int:
    """Return the process of Serve's proxy on this machine."""
    processes = psutil.process_iter(["cmdline"])
    return next(p.pid for p in processes if "ray::ProxyActor" in " ".join(p.info["cmdline"] or []))


def measure(generator_decodes: bool, port: int, chunks: int) -> dict[str, Any]:
    """Deploy one of the two layouts and load it."""
    decoder = Decoder.bind()
    encoder = Encoder.bind()
    generator = Generator.bind(decoder, generator_decodes)
    handle = serve.run(Gateway.bind(encoder, generator, decoder, generator_decodes), name="path", route_prefix="/")
    pids = {"gateway": handle.pid.remote().result(), "proxy": find_proxy()}
    for name in ("Encoder", "Generator", "Decoder"):
        pids[name.lower()] = serve.get_deployment_handle(name, "path").pid.remote().result()
    result = {
        "single": asyncio.run(load(port, pids, 1, chunks, 101)),
        "paced": asyncio.run(load(port, pids, 4, chunks, 101)),
        "full": asyncio.run(load(port, pids, 8, chunks, 0)),
    }
    serve.delete("path")
    return result


def main() -> None:
    """Measure both layouts, in turns, and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9137, help="port of the gRPC proxy (default 9137)")
    parser.add_argument("--chunks", type=int, default=150, help="chunks a session (default 150)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each layout is measured (default 2)")
    arguments = parser.parse_args()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    try:
        servicer = "protos.causal_forcing.v1.video_pb2_grpc.add_VideoServiceServicer_to_server"
        serve.start(grpc_options=gRPCOptions(port=arguments.port, grpc_servicer_functions=[servicer]))
        rounds = [
            {
                "gateway_decodes": measure(False, arguments.port, arguments.chunks),
                "generator_decodes": measure(True, arguments.port, arguments.chunks),
            }
            for _ in range(arguments.rounds)
        ]
    finally:
        serve.shutdown()
        ray.shutdown()
    chunk = {"latents_bytes": LATENTS, "frames": FRAMES, "frame_bytes": FRAME_BYTES}
    ours = statistics.median(r["gateway_decodes"]["full"]["gateway_chunks_per_core_s"] for r in rounds)
    theirs = statistics.median(r["generator_decodes"]["full"]["gateway_chunks_per_core_s"] for r in rounds)
    value = f"{ours:.0f} chunks/s a core (if the generator called the decoder: {theirs:.0f})"
    readme = [{"measure": "Gateway capacity, 4 frames of 60 kB a chunk", "value": value}]
    write("gateway_path", {"chunk": chunk, "rounds": rounds, "readme": readme})


if __name__ == "__main__":
    main()
