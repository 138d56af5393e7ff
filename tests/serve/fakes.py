"""The service without Ray: the gateway's session, a real lease, a real mailbox and decoder, on one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from causal_forcing.config import SessionConfig
from causal_forcing.cursor import CacheCursor
from causal_forcing.errors import CausalForcingError, InvalidRequest
from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from causal_forcing.resume import StreamPoint
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.config import ServiceConfig, load_config
from serve.device import Warden
from serve.errors import Unavailable
from serve.gateway.inputs import StreamInput
from serve.gateway.session import LiveSession
from serve.generator import Lease
from serve.mailbox import MailboxRoom
from serve.messages import (
    Claim,
    CloseDecoder,
    Control,
    Decoded,
    DecodeRequest,
    EncodeImage,
    GeneratedChunk,
    LeaseEvent,
    LeaseRequest,
    LeaseStarted,
    PackedEmbedding,
    PackedTensor,
    QueuePlace,
    Resume,
)
from serve.simulated import SimulatedDecoder, SimulatedGenerator, SimulatedText
from serve.status import FailedElsewhere, failure_of
from serve.vae_decoder import DecoderService

REPLICA = "generator-1"
DECODER = "decoder-1"


def simulated(**fields: Any) -> ServiceConfig:
    """Return a service that computes nothing and takes no time."""
    sleeps = {"chunk_ms": 0.0, "decode_ms": 0.0, "encode_ms": 0.0}
    return load_config(None, engine="simulated", **{"simulated": sleeps, **fields})


class Clock:
    """A clock that is set by hand."""

    now_s = 500.0

    def __call__(self) -> float:
        return self.now_s


class Client:
    """What a client sends, as the gateway reads it."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[pb.StreamVideoRequest | Exception | None] = asyncio.Queue()

    def send(self, **message: Any) -> None:
        self._queue.put_nowait(pb.StreamVideoRequest(**message))

    def config(self, text: str = "a fox", **fields: Any) -> None:
        prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text=text)], prompt_id="first")
        chosen = {"seed": 1, "pacing": "PACING_AS_FAST_AS_POSSIBLE", **fields}
        self.send(config=pb.SessionConfig(prompt=prompt, **chosen))

    def prompt(self, text: str, **fields: Any) -> None:
        self.send(prompt=pb.PromptUpdate(prompts=[pb.WeightedPrompt(text=text)], **fields))

    def ack(self, chunk: int) -> None:
        self.send(ack=pb.Ack(chunk_index=chunk))

    def half_close(self) -> None:
        self._queue.put_nowait(None)

    def fail(self, error: Exception) -> None:
        self._queue.put_nowait(error)

    def __aiter__(self) -> AsyncIterator[pb.StreamVideoRequest]:
        return self

    async def __anext__(self) -> pb.StreamVideoRequest:
        message = await self._queue.get()
        if message is None:
            raise StopAsyncIteration
        if isinstance(message, Exception):
            raise message
        return message


class RemoteMailbox:
    """A mailbox with Ray's way of calling."""

    def __init__(self, room: MailboxRoom) -> None:
        self.poll = RemoteMethod(room.poll)


@dataclass(frozen=True)
class RemoteMethod:
    """`method.remote(...)` is awaited."""

    call: Callable[..., Any]

    def remote(self, *args: Any) -> Any:
        return self.call(*args)


@dataclass
class FakeBackends:
    """The rest of the service, in process; scripted where a test says so.

    Attributes:
        service: Configuration.
        places_script: What admission says, in order; the last one grants.
        lease_failures: Errors that the next leases raise instead of beginning.
        decode_failures: Errors that the next decode calls raise; those of None go well.
        losses: After how many chunks the next leases' generators die.
        events: What was called, in order.
        encode_gate: Until it is set, no prompt is encoded.
        leave_gate: Until it is set, admission does not answer that a session has left.
        leaving: Set when a session leaves.
    """

    service: ServiceConfig = field(default_factory=simulated)
    places_script: list[QueuePlace] = field(default_factory=lambda: [QueuePlace(0, None, REPLICA)])
    lease_failures: list[Exception] = field(default_factory=list)
    decode_failures: list[Exception | None] = field(default_factory=list)
    losses: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    room: MailboxRoom = field(default_factory=MailboxRoom)
    running: int = 0
    encode_gate: asyncio.Event | None = None
    leave_gate: asyncio.Event | None = None
    leaving: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.mailbox = RemoteMailbox(self.room)
        self._generating, self._decoding = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._engine = SimulatedGenerator(self.service)
        self._text = SimulatedText(self.service)
        self.decoder = DecoderService(SimulatedDecoder(self.service), DECODER, 1 << 30, Warden(self._decoding, 60.0))
        self._places: asyncio.Queue[QueuePlace] = asyncio.Queue()

    @property
    def admission(self) -> FakeBackends:
        return self

    async def places(self, claim: Claim) -> AsyncGenerator[QueuePlace]:
        for place in self.places_script:
            yield place
        while True:
            yield await self._places.get()

    async def confirm(self, session_id: str, replica_id: str) -> None:
        self.events.append(f"confirm {replica_id}")

    async def refuse(self, session_id: str, replica_id: str, *, gone: bool) -> None:
        self.events.append(f"refuse {replica_id}{' gone' if gone else ''}")
        self._places.put_nowait(QueuePlace(0, None, REPLICA))

    async def retire(self, replica_id: str) -> None:
        self.events.append(f"retire {replica_id}")

    async def requeue(self, session_id: str, replica_id: str) -> None:
        self.events.append(f"requeue {replica_id}")

    async def leave(self, session_id: str) -> None:
        self.leaving.set()
        if self.leave_gate is not None:
            await self.leave_gate.wait()
        self.events.append("leave")

    async def lease(self, request: LeaseRequest) -> AsyncGenerator[LeaseEvent]:
        if self.lease_failures:
            raise self.lease_failures.pop(0)
        lease = Lease(request, self._engine, self._generating)
        self.running += 1
        left = self.losses.pop(0) if self.losses else -1
        try:
            yield LeaseStarted(request.replica_id)
            async for event in lease.events():
                if not left:
                    raise Unavailable("the generator of this session died")
                left -= 1
                yield event
        finally:
            await lease.close()
            self.running -= 1

    async def open_mailbox(self, log_id: str) -> None:
        self.room.open(log_id)

    async def put(self, log_id: str, message: Control) -> None:
        self.room.put(log_id, message)

    async def close_mailbox(self, log_id: str) -> None:
        self.room.close(log_id)

    async def encode(self, text: str) -> PackedEmbedding:
        if self.encode_gate is not None:
            await self.encode_gate.wait()
        return self._text.encode([text])[0]

    async def decode(self, request: DecodeRequest) -> Decoded:
        failure = self.decode_failures.pop(0) if self.decode_failures else None
        if failure is not None:
            raise failure
        return await self.decoder.decode(request)

    async def encode_image(self, request: EncodeImage) -> PackedTensor:
        try:
            return await self.decoder.encode_image(request)
        except InvalidRequest as error:
            raise FailedElsewhere(failure_of(error)) from error

    async def close_decoder(self, request: CloseDecoder) -> None:
        self.decoder.cache.drop(request.session_id)

    async def idle(self) -> None:
        """Return when the devices' threads have done what they were given."""
        for device in (self._generating, self._decoding):
            await asyncio.get_running_loop().run_in_executor(device, int)

    @property
    def is_clean(self) -> bool:
        """Whether nothing of any session is left."""
        return not self.running and not self.room.count() and not len(self.decoder.cache)


def open_session(
    backends: FakeBackends, client: Client, name: str = "session-1", clock: Callable[[], float] = time.monotonic
) -> LiveSession:
    """Return a session."""
    return LiveSession(name, backends.service, backends, StreamInput(client, backends.service), clock=clock)


async def play(
    session: LiveSession, client: Client, on_message: Callable[[pb.StreamVideoResponse], None]
) -> list[pb.StreamVideoResponse]:
    """Return everything a session says; each message is shown to ``on_message``, which may send something."""
    heard = []
    async for message in session.messages():
        heard.append(message)
        on_message(message)
    return heard


def kinds(messages: Sequence[pb.StreamVideoResponse]) -> list[str]:
    """Return what the messages are, frames of a chunk taken together."""
    names = [message.WhichOneof("message") or "" for message in messages]
    return [name for index, name in enumerate(names) if name != "frame" or index == 0 or names[index - 1] != "frame"]


def latents(values: Sequence[int], height: int = 2, width: int = 2) -> PackedTensor:
    """Return latents of one frame a value."""
    data = np.zeros((1, 16, len(values), height, width), np.float32)
    data[0, 0, :, 0, 0] = values
    return PackedTensor(data, "float32")


def chunk(index: int, **fields: Any) -> GeneratedChunk:
    """Return a chunk of one frame."""
    made = GeneratedChunk(
        index=index,
        latents=latents([index]),
        starts_scene=index == 0,
        prompt_id="p",
        prompt_applied=False,
        point=StreamPoint(index + 1, index + 1, CacheCursor(end=index + 1)),
    )
    return replace(made, **fields)


def update(text: str = "a fox", **fields: Any) -> PromptUpdate:
    """Return a prompt update."""
    return PromptUpdate((WeightedPrompt(text),), **fields)


def embedding(key: str) -> PackedEmbedding:
    """Return an embedding."""
    return PackedEmbedding(key, PackedTensor(np.zeros((1, 1, 1), np.float32), "float32"))


class ScriptedEngine:
    """A generator engine whose sessions do what a list says: seconds of work, or an error."""

    def __init__(self, script: Sequence[CausalForcingError | None] = ()) -> None:
        self.script = list(script)
        self.updates: list[str] = []

    cache_bytes = cache_limit_bytes = 1000

    def warm_up(self) -> None:
        pass

    def open(self, config: SessionConfig) -> ScriptedEngine:
        self.index = 0
        return self

    def resume(self, config: SessionConfig, resume: Resume) -> ScriptedEngine:
        self.index = resume.point.chunk_index
        self.updates.append(resume.prompts[-1].update.prompt_id)
        return self

    def update_prompt(self, update: PromptUpdate, embeddings: Sequence[PackedEmbedding]) -> None:
        self.updates.append(update.prompt_id)

    def start_from(self, latents: PackedTensor) -> GeneratedChunk:
        return self._next(latents)

    def generate(self, should_stop: Callable[[], bool]) -> GeneratedChunk | None:
        if should_stop():
            return None
        error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error
        return self._next(latents([self.index]))

    def _next(self, made_of: PackedTensor) -> GeneratedChunk:
        made = chunk(self.index, latents=made_of, prompt_id=self.updates[-1])
        self.index += 1
        return made


LOST = Unavailable("gone")
