"""Viewers of the service: opens sessions over gRPC, acks what it gets, and prints what it saw and what that cost.

    python benchmarks/serve_load.py --server 127.0.0.1:9000 --sessions 4 --chunks 46

One process with the bare generated stub, so that it costs as little as a client can; its own CPU time is in the answer.
Times are seconds of the machine's monotonic clock from the start of the program. Nothing is decoded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc

PACING = {"fast": pb.PACING_AS_FAST_AS_POSSIBLE, "realtime": pb.PACING_REALTIME}


@dataclass
class Switch:
    """One change of prompt.

    Attributes:
        sent_s: When it was sent.
        shown_s: When the first frame of it was there.
        applied_chunk: That frame's chunk.
        chunks_behind: Chunks of the old prompt that came after it was sent.
    """

    sent_s: float
    shown_s: float = 0.0
    applied_chunk: int = 0
    chunks_behind: int = 0


@dataclass
class Seen:
    """What one viewer saw of one session.

    Attributes:
        user: Who watched.
        opened_s: When the session was asked for.
        queued_s: When the service first said where it stands.
        started_s: When it had a generator.
        chunk_s: When each chunk was complete.
        frame_count: Frames.
        byte_count: Their size.
        denoise_s: What the service says each chunk took in the generator.
        decode_s: The same in the decoder.
        encode_s: The same for encoding.
        round_trip_s: From ping to pong, each.
        switches: Changes of prompt.
        error: Reason, if it ended badly.
    """

    user: int
    opened_s: float = 0.0
    queued_s: float = 0.0
    started_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    frame_count: int = 0
    byte_count: int = 0
    denoise_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    round_trip_s: list[float] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    error: str = ""


class Viewer:
    """Watches one session on a channel of its own, as a user does."""

    def __init__(self, options: argparse.Namespace, user: int, epoch_s: float) -> None:
        self._options = options
        self._epoch_s = epoch_s
        self._random = random.Random(user)
        self._pings: dict[int, float] = {}
        self._waiting: Switch | None = None
        self._switch_id = ""
        self._switches_from = options.warm_up_chunks
        self._jobs: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self.seen = Seen(user)

    def _now_s(self) -> float:
        return round(time.monotonic() - self._epoch_s, 6)

    async def watch(self, channel: grpc.aio.Channel) -> Seen:
        """Return what was seen, once there are enough chunks or the service has ended the session."""
        stub = video_pb2_grpc.VideoServiceStub(channel)
        self._call = stub.StreamVideo()
        self.seen.opened_s = self._now_s()
        try:
            await self._send(config=self._config())
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if await self._take(message):
                    await self._send(end=pb.End())
                    await self._call.done_writing()
                    break
            while await self._call.read() is not grpc.aio.EOF:  # until the service has given everything back
                pass
        except grpc.aio.AioRpcError as error:
            self.seen.error = self.seen.error or error.code().name
        for job in self._jobs:
            job.cancel()
        return self.seen

    async def _send(self, **message: Any) -> None:  # noqa: ANN401
        async with self._writing:  # a call takes one message at a time
            await self._call.write(pb.StreamVideoRequest(**message))

    def _config(self) -> pb.SessionConfig:
        prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="a red circle")], prompt_id="first")
        config = pb.SessionConfig(
            prompt=prompt, seed=self.seen.user, credit_chunks=self._options.credit, pacing=PACING[self._options.pacing]
        )
        if self._options.size:
            config.height = config.width = self._options.size
        return config

    async def _take(self, message: pb.StreamVideoResponse) -> bool:
        """Take a message in; return whether that was all."""
        match message.WhichOneof("message"):
            case "frame":
                return await self._frame(message.frame)
            case "queue_status":
                self.seen.queued_s = self.seen.queued_s or self._now_s()
            case "session_started":
                self.seen.started_s = self._now_s()
            case "pong":
                self.seen.round_trip_s.append(self._now_s() - self._pings.pop(message.pong.nonce))
            case "error":
                self.seen.error = message.error.status.message
        return False

    async def _frame(self, frame: pb.VideoFrame) -> bool:
        seen = self.seen
        seen.byte_count += len(frame.data)
        if self._waiting is not None and frame.prompt_id == self._switch_id:
            self._waiting.shown_s, self._waiting.applied_chunk = self._now_s(), frame.chunk_index
            seen.switches.append(self._waiting)
            self._waiting, self._switches_from = None, frame.chunk_index + 2
        if frame.part_index < frame.part_count - 1:
            return False
        seen.frame_count += 1
        if not frame.last_in_chunk:
            return False
        seen.chunk_s.append(self._now_s())
        for name in ("denoise", "decode", "encode"):
            getattr(seen, f"{name}_s").append(getattr(frame.timings, name).ToNanoseconds() / 1e9)
        if self._waiting is not None and frame.prompt_id != self._switch_id:
            self._waiting.chunks_behind += 1
        await self._send(ack=pb.Ack(chunk_index=frame.chunk_index))
        if self._is_enough():
            return True
        self._after_chunk(frame.chunk_index)
        return False

    def _is_enough(self) -> bool:
        seen, options = self.seen, self._options
        if options.switches:
            return len(seen.switches) == options.switches
        return len(seen.chunk_s) >= options.chunks or bool(options.seconds and seen.chunk_s[-1] > options.seconds)

    def _after_chunk(self, chunk: int) -> None:
        """Now and then ping, or change the prompt at a moment that has nothing to do with the chunks."""
        if self._options.ping and chunk % 4 == 0:
            self._later(self._ping(chunk))
        due = self._options.switches and self._waiting is None and chunk >= self._switches_from
        if due and not self._jobs:
            self._later(self._switch(self._random.random() * self._options.switch_phase_s))

    def _later(self, work: Any) -> None:  # noqa: ANN401
        job = asyncio.create_task(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _ping(self, nonce: int) -> None:
        self._pings[nonce] = self._now_s()
        await self._send(ping=pb.Ping(nonce=nonce))

    async def _switch(self, after_s: float) -> None:
        """Send one of two prompts, both of which the text encoder has seen by the third time."""
        await asyncio.sleep(after_s)
        number = len(self.seen.switches)
        self._switch_id = f"switch-{number}"
        update = pb.PromptUpdate(
            prompts=[pb.WeightedPrompt(text=("a blue square", "a red circle")[number % 2])], prompt_id=self._switch_id
        )
        self._waiting = Switch(self._now_s())
        await self._send(prompt=update)


async def user(options: argparse.Namespace, number: int, epoch_s: float) -> list[Seen]:
    """Return the sessions of one user: one, or one after the other until the time is over."""
    watched = []
    channel_options = [("grpc.use_local_subchannel_pool", 1)]  # each user has a connection of its own
    async with grpc.aio.insecure_channel(options.server, options=channel_options) as channel:
        for _ in range(options.repeat):
            watched.append(await Viewer(options, number, epoch_s).watch(channel))
            if options.until and time.monotonic() - epoch_s > options.until:
                break
    return watched


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all users saw, and this process's CPU time."""
    epoch_s = time.monotonic()
    users = [user(options, number, epoch_s) for number in range(options.sessions)]
    sessions = [seen for watched in await asyncio.gather(*users) for seen in watched]
    seconds = time.monotonic() - epoch_s
    return {
        "sessions": [asdict(seen) for seen in sessions],
        "seconds": round(seconds, 3),
        "client_cpu_share": round(time.process_time() / seconds, 3),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="host:port")
    parser.add_argument("--sessions", type=int, default=1, help="users at the same time (default 1)")
    parser.add_argument("--chunks", type=int, default=46, help="chunks of each session (default 46)")
    parser.add_argument("--seconds", type=float, default=0, help="ends a session at the first chunk after this time")
    parser.add_argument("--repeat", type=int, default=1, help="sessions of each user, one after the other (default 1)")
    parser.add_argument("--until", type=float, default=0, help="no user begins a session after this time")
    parser.add_argument("--pacing", choices=PACING, default="fast", help="what to ask for (default fast)")
    parser.add_argument("--credit", type=int, default=2, help="chunks of credit, W (default 2)")
    parser.add_argument("--size", type=int, default=0, help="height and width (default the server's)")
    parser.add_argument("--switches", type=int, default=0, help="end after this many prompt changes instead")
    parser.add_argument("--switch-phase-s", type=float, default=0.1, help="spread of their times within a chunk")
    parser.add_argument("--warm-up-chunks", type=int, default=6, help="chunks before the first change (default 6)")
    parser.add_argument("--ping", type=int, default=0, help="1: ping every fourth chunk")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(parse(sys.argv[1:])))))
