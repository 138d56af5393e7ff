"""What the processes of the service say to each other: frozen values that pickle, without torch.

Read in the order of a session's life: a :class:`Ticket` waits, a :class:`QueuePlace` tells where, a
:class:`LeaseRequest` goes to the generator, :class:`Control` messages follow it through the mailbox,
:class:`LeaseEvent` values come back, and each chunk makes a :class:`DecodeRequest` and its :class:`Decoded`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from causal_forcing.config import SessionConfig
from causal_forcing.geometry import pixel_frames
from causal_forcing.prompts import PromptUpdate
from causal_forcing.resume import StreamPoint

from .codecs.frames import EncodedFrame, FrameFormat
from .metrics.drift import LatentStats
from .status import Failure

if TYPE_CHECKING:
    from torch import Tensor

PRIME_FRAMES: Final = 38
"""Latent frames after which a fresh decoder gives exact pixels; what a gateway keeps of each session.

Source: measured on the Wan decoder (its temporal reach); ``WanVae.REACH``.
"""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor on its way between processes, bit for bit; numpy has no bfloat16, and the gateway has no torch.

    Attributes:
        data: The numbers, or for bfloat16 their bits as 16-bit integers; read-only where it was received.
        dtype: Name of the torch dtype, e.g. ``bfloat16``.
    """

    data: npt.NDArray[Any]
    dtype: str

    @classmethod
    def pack(cls, tensor: Tensor) -> PackedTensor:
        """Return a packed copy on the host."""
        import torch

        name = str(tensor.dtype).removeprefix("torch.")
        host = tensor.detach().cpu().contiguous()
        if tensor.dtype is torch.bfloat16:
            host = host.view(torch.int16)
        return cls(host.numpy().copy(), name)

    def unpack(self) -> Tensor:
        """Return a writable tensor on the host."""
        import torch

        tensor = torch.from_numpy(self.data.copy())
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor

    @property
    def frames(self) -> int:
        """Latent frames, for latents ``[1, 16, F, h, w]``."""
        return int(self.data.shape[2])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.data.nbytes

    def copy(self) -> PackedTensor:
        """Return a copy in this process's own memory; what was received pins the object store."""
        return PackedTensor(self.data.copy(), self.dtype)

    @staticmethod
    def join_frames(parts: list[PackedTensor]) -> PackedTensor:
        """Return latents joined along time; at least one part."""
        return PackedTensor(np.concatenate([part.data for part in parts], axis=2), parts[0].dtype)

    def frame_slice(self, first: int, last: int) -> PackedTensor:
        """Return latent frames ``first`` to ``last - 1``."""
        return PackedTensor(self.data[:, :, first:last], self.dtype)


@dataclass(frozen=True)
class PackedEmbedding:
    """One prompt's embedding on its way to the generator.

    Attributes:
        key: Names the embedding; equal keys mean equal embeddings.
        tensor: ``[1, text_len, text_dim]``.
    """

    key: str
    tensor: PackedTensor


LOCAL_TENANT: Final = "local"
"""Whose sessions those of callers without an identity are."""


@dataclass(frozen=True)
class Share:
    """What a tenant may have of the generators.

    Attributes:
        tenant: Its name.
        weight: Its part of the generators' time when there is not enough for all, relative to the others'.
        max_sessions: Sessions that may have a generator at a time; further ones wait. None: no limit.
        max_queued: Sessions that may wait; further ones are refused. None: no limit but the service's.
    """

    tenant: str = LOCAL_TENANT
    weight: float = 1.0
    max_sessions: int | None = None
    max_queued: int | None = None


@dataclass(frozen=True)
class Claim:
    """What a session asks admission for.

    Attributes:
        session_id: Its name.
        share: Its tenant's.
        nbytes: Memory that it needs in a generator; 0 where nobody counts.
    """

    session_id: str
    share: Share = Share()
    nbytes: int = 0


@dataclass(frozen=True)
class Ticket:
    """A session's claim to a generator, as its gateway keeps it.

    Attributes:
        session_id: Its name.
        gateway_id: Unique id of the gateway replica that carries it.
        arrived_s: When it came, in seconds since the epoch; within a tenant first come, first served.
        replica_id: The generator it holds; empty while it waits.
        share: Its tenant's.
        nbytes: Memory that it needs in a generator.
        held_s: How long its lease had run when the ticket was written.
        is_moving: Whether it has run and lost its generator; it is served before all sessions that have not begun.
    """

    session_id: str
    gateway_id: str
    arrived_s: float
    replica_id: str = ""
    share: Share = Share()
    nbytes: int = 0
    held_s: float = 0.0
    is_moving: bool = False


@dataclass(frozen=True)
class QueuePlace:
    """Where a session stands.

    Attributes:
        ahead: Sessions that get a generator before it.
        estimated_wait_s: A guess from recent sessions; None while there is nothing to guess from.
        replica_id: The generator granted to it; empty while it waits.
        most_bytes: Set when no generator could ever hold it: the most memory that one has for sessions.
    """

    ahead: int
    estimated_wait_s: float | None = None
    replica_id: str = ""
    most_bytes: int | None = None


@dataclass(frozen=True)
class Progress:
    """What a session has had so far.

    Attributes:
        is_paused: Whether it rests.
        chunk_count: Chunks sent.
        frame_count: Pixel frames sent.
        byte_count: Bytes of encoded frames sent.
        dropped_frame_count: Pixel frames made and not sent.
        prompt_count: Prompts it was given.
        held_s: How long it has had a generator.
        text_s: Spent in text encoders.
        denoise_s: Spent in generators.
        decode_s: Spent in decoders on pixels, rebuilt caches included.
        encode_s: Spent in decoders on the frames' encoding.
        memory_bytes: What it takes in its gateway at the moment.
    """

    is_paused: bool = False
    chunk_count: int = 0
    frame_count: int = 0
    byte_count: int = 0
    dropped_frame_count: int = 0
    prompt_count: int = 0
    held_s: float = 0.0
    text_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class SessionView:
    """Where a session stands, as admission knows it.

    Attributes:
        session_id: Its name.
        tenant: Whose it is.
        is_running: Whether it has a generator.
        ahead: Sessions that get a generator before it.
        age_s: Since it came.
        progress: What it has had.
    """

    session_id: str
    tenant: str
    is_running: bool
    ahead: int
    age_s: float
    progress: Progress = Progress()


@dataclass(frozen=True)
class GeneratorDemand:
    """What admission knows of the need for generators.

    Attributes:
        waiting: Sessions that the next generators would go to.
        held: Sessions at each generator that takes sessions, granted ones included; all that it could hold if the
            sessions that wait do not fit into its memory.
        nodes: The node that each of them runs on.
    """

    waiting: int
    held: dict[str, int]
    nodes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt update that has taken effect.

    Attributes:
        chunk: The first chunk made under it.
        update: The update.
        embeddings: One per prompt.
    """

    chunk: int
    update: PromptUpdate
    embeddings: tuple[PackedEmbedding, ...]


@dataclass(frozen=True)
class Resume:
    """What a generator needs to go on with another one's session (see :mod:`causal_forcing.resume`).

    Attributes:
        point: Where the session stands.
        latents: ``[1, 16, F, h, w]`` with the position of its first frame, for every frame in the model's window.
        prompts: The update in force, and before it those that its transition comes from, oldest first.
    """

    point: StreamPoint
    latents: tuple[tuple[int, PackedTensor], ...]
    prompts: tuple[ShownPrompt, ...]


@dataclass(frozen=True)
class LeaseRequest:
    """Asks a generator for a session; the call's first argument, so that the router sees ``replica_id``.

    Attributes:
        replica_id: The granted generator.
        session_id: The session.
        config: What the engine shall run.
        credit_chunks: Chunks it may be ahead of the last ack.
        mailbox: Actor handle of the gateway's mailbox.
        idle_timeout_s: The generator gives up when the gateway leaves it without work for this long.
        log_id: The log in the mailbox that is meant for this lease.
        resume: What to go on from; None for a session that has no chunk yet.
        frames_per_second: Pace of the video; None is as fast as possible.
        lead_s: How much earlier than at its time in the video a chunk may be begun.
        model: The gateway's model (see :func:`serve.admission.succession.refusal`); likewise in the other requests.
    """

    replica_id: str
    session_id: str
    config: SessionConfig
    credit_chunks: int
    mailbox: Any
    idle_timeout_s: float
    log_id: str
    resume: Resume | None = None
    frames_per_second: float | None = None
    lead_s: float = 0.0
    model: str = ""


@dataclass(frozen=True)
class SetPrompt:
    """Control: what the next chunk shows.

    Attributes:
        update: The prompts.
        embedding_keys: One per prompt.
        embeddings: Those of them that this lease has not seen, or has forgotten.
    """

    update: PromptUpdate
    embedding_keys: tuple[str, ...]
    embeddings: tuple[PackedEmbedding, ...]


@dataclass(frozen=True)
class Credit:
    """Control: the client is finished with every chunk up to this one."""

    acked_chunk: int


@dataclass(frozen=True)
class SetPaused:
    """Control: rest after the chunk under way, or go on."""

    paused: bool


@dataclass(frozen=True)
class StartFrom:
    """Control: chunk 0 is this one, not a generated one; comes before the first prompt.

    Attributes:
        latents: ``[1, 16, 1, h, w]`` of the start image.
    """

    latents: PackedTensor


@dataclass(frozen=True)
class Stop:
    """Control: end the lease."""


Control = SetPrompt | Credit | SetPaused | StartFrom | Stop
"""What a gateway tells a generator while a lease runs."""


@dataclass(frozen=True)
class Process:
    """Where a replica runs, for whoever has to end it from outside.

    Attributes:
        replica_id: The replica.
        process_id: Its process.
        node_id: The node that this is on.
    """

    replica_id: str
    process_id: int
    node_id: str


@dataclass(frozen=True)
class Encoded:
    """A text encoder's answer.

    Attributes:
        embedding: Of the prompt.
        process: Who answered.
    """

    embedding: PackedEmbedding
    process: Process


@dataclass(frozen=True)
class LeaseStarted:
    """The lease began.

    Attributes:
        replica_id: The generator replica it began on.
        process_id: Its process.
        node_id: Where that runs.
    """

    replica_id: str
    process_id: int = field(default=0, compare=False)
    node_id: str = field(default="", compare=False)

    @property
    def process(self) -> Process:
        """Who serves the lease."""
        return Process(self.replica_id, self.process_id, self.node_id)


@dataclass(frozen=True)
class GeneratedChunk:
    """One committed chunk.

    Attributes:
        index: 0, 1, 2, ...
        latents: ``[1, 16, F, h, w]``.
        starts_scene: Whether its first latent frame decodes to one pixel frame with a fresh decoder.
        prompt_id: Of the update in force.
        prompt_applied: Whether it is the first one made under that update.
        point: Where the session stands after it.
        superseded: Ids of updates that this one replaced before they were applied.
        denoise_s: Time it took, the context pass included.
        context_s: Time of the context pass.
        credit_wait_s: How long the generator had to wait for the client's credit before it.
        recaches: Times that keys and values were recomputed for it.
        made_s: When it was finished, in seconds since the epoch.
        stats: Of its latents; None where they were not generated.
    """

    index: int
    latents: PackedTensor
    starts_scene: bool
    prompt_id: str
    prompt_applied: bool
    point: StreamPoint
    superseded: tuple[str, ...] = ()
    denoise_s: float = 0.0
    context_s: float = 0.0
    credit_wait_s: float = 0.0
    recaches: int = 0
    made_s: float = 0.0
    stats: LatentStats | None = None

    @property
    def frame_count(self) -> int:
        """Pixel frames that it decodes to."""
        return pixel_frames(self.latents.frames, first=self.starts_scene)


@dataclass(frozen=True)
class LeaseEnded:
    """The lease is over; with a failure if it did not end as asked."""

    failure: Failure | None = None


LeaseEvent = LeaseStarted | GeneratedChunk | LeaseEnded
"""What a lease yields."""


@dataclass(frozen=True)
class DecodeRequest:
    """Asks a decoder for a chunk's frames; the call's first argument, so that the router sees ``replica_id``.

    Attributes:
        replica_id: The decoder that has this session's temporal cache; empty for any.
        session_id: The session.
        chunk_index: Repeating the last chunk returns the same frames again.
        latents: ``[1, 16, F, h, w]``.
        starts_scene: Whether to begin with a fresh cache.
        height: Pixel rows.
        width: Pixel columns.
        format: How to encode.
        first_frame: Number of its first pixel frame in the session; the time stamps of H.264 follow from it.
        encode: False when nobody will see the chunk: only the cache goes on.
        keyframe: Whether its first frame must be decodable by itself.
        history: Up to 38 latent frames before the chunk, in answer to NEED_PRIME; None otherwise.
        loads: Without a ``replica_id``, how many of the gateway's sessions each decoder has; the least gets this one.
        model: Key of the gateway's model; another one's decoder refuses.
    """

    replica_id: str
    session_id: str
    chunk_index: int
    latents: PackedTensor
    starts_scene: bool
    height: int
    width: int
    format: FrameFormat
    first_frame: int = 0
    encode: bool = True
    keyframe: bool = False
    history: PackedTensor | None = None
    loads: Mapping[str, int] = field(default_factory=dict)
    model: str = ""


@dataclass(frozen=True)
class Decoded:
    """A decoder's answer.

    Attributes:
        replica_id: Who answered; the session's cache is there now.
        frames: The encoded frames in order, none if that was not asked for; None says NEED_PRIME: ask again with the
            history.
        decode_s: Time from latents to pixels.
        encode_s: Time from pixels to bytes.
        prime_s: Time to rebuild the cache, when that was needed.
        process: Who answered.
    """

    replica_id: str
    frames: tuple[EncodedFrame, ...] | None
    decode_s: float = 0.0
    encode_s: float = 0.0
    prime_s: float = 0.0
    process: Process | None = field(default=None, compare=False)


@dataclass(frozen=True)
class EncodeImage:
    """Asks a decoder replica, which has the VAE, for the latents of a start image.

    Attributes:
        data: The file.
        height: Pixel rows of the session.
        width: Pixel columns of the session.
        model: Key of the gateway's model; another one's decoder refuses.
        session_id: Whose image it is, for the log.
    """

    data: bytes
    height: int
    width: int
    model: str = ""
    session_id: str = ""


@dataclass(frozen=True)
class CloseDecoder:
    """Tells a decoder that a session is over; the call's first argument."""

    replica_id: str
    session_id: str


@dataclass
class EmbeddingWindow:
    """The embeddings that a lease remembers; gateway and generator keep the same ones by the same rule.

    Attributes:
        capacity: How many; the least recently used is forgotten.
    """

    capacity: int = 16
    _items: dict[str, PackedEmbedding] = field(default_factory=dict)

    def admit(self, update: SetPrompt) -> tuple[PackedEmbedding, ...]:
        """Take in a prompt's new embeddings and return all of the prompt's embeddings in order.

        Raises:
            KeyError: If an embedding is neither new nor remembered.
        """
        new = {embedding.key: embedding for embedding in update.embeddings}
        chosen = tuple(new.get(key) or self._items[key] for key in update.embedding_keys)
        for embedding in chosen:
            self._items.pop(embedding.key, None)
            self._items[embedding.key] = embedding
        while len(self._items) > self.capacity:
            del self._items[next(iter(self._items))]
        return chosen

    def compose(self, update: PromptUpdate, embeddings: list[PackedEmbedding]) -> SetPrompt:
        """Return the message that makes the other end's window have these embeddings, and take them in here."""
        keys = tuple(embedding.key for embedding in embeddings)
        unseen = {embedding.key: embedding for embedding in embeddings if embedding.key not in self._items}
        message = SetPrompt(update, keys, tuple(unseen.values()))
        self.admit(message)
        return message
