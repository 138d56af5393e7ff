"""Every metric of the project: its name, unit, labels, buckets and meaning. docs/metrics.md is written from this table.

On a Ray node's metrics port a name begins with ``ray_`` and carries ``application``, ``deployment`` and ``replica``
beside the labels here; through prometheus-client it is as it stands. No label takes a value that a user chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

PREFIX = "causal_forcing_"
"""Begins every name."""


class Kind(StrEnum):
    """What Prometheus calls the type of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Role(StrEnum):
    """Which process records a metric."""

    GATEWAY = "gateway"
    TEXT_ENCODER = "text encoder"
    GENERATOR = "generator"
    DECODER = "VAE decoder"
    ADMISSION = "admission"
    REPLICA = "every replica"
    CLIENT = "client"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        kind: Its type.
        name: Without the prefix; ends with the unit, and a counter's with ``_total``.
        unit: What a value of 1 means.
        help: One sentence.
        role: Which process records it.
        labels: Each label's possible values; empty for one whose values are listed elsewhere (and are still few).
        buckets: Upper bounds of a histogram's buckets.
    """

    kind: Kind
    name: str
    unit: str
    help: str
    role: Role
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    buckets: tuple[float, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def full_name(self) -> str:
        """The name with its prefix."""
        return PREFIX + self.name


ALL: dict[str, Metric] = {}
"""Every metric by its name without the prefix, in the order of this file."""

STAGE_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)
START_S = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300, 600, 1800)
LENGTH_S = (5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
RATIO = (0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
DRIFT = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)

GENERATOR_STAGES = ("denoise", "context")
DECODER_STAGES = ("decode", "encode", "prime")


def _define(
    kind: Kind,
    role: Role,
    name: str,
    unit: str,
    text: str,
    /,
    *buckets: float,
    **labels: tuple[str, ...],
) -> Metric:
    assert name not in ALL, f"{name} is defined twice"
    metric = ALL[name] = Metric(kind, name, unit, text, role, MappingProxyType(labels), buckets)
    return metric


# Sessions -------------------------------------------------------------------------------------------------------------

SESSIONS = _define(
    Kind.GAUGE,
    Role.GATEWAY,
    "sessions",
    "sessions",
    "Sessions that a gateway carries, by what they are doing.",
    state=("waiting", "streaming", "paused"),
)
SESSIONS_STARTED = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "sessions_started_total",
    "sessions",
    "Sessions that got a generator.",
)
SESSIONS_FINISHED = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "sessions_finished_total",
    "sessions",
    "Calls that ended: served as asked, ended by the client's own doing, refused for lack of room, or failed here.",
    outcome=("served", "client", "refused", "failed"),
)
SESSION_ERRORS = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "session_errors_total",
    "sessions",
    "Calls that ended with an error, by its reason (docs/api.md lists them).",
    reason=(),
)
SESSION_REJECTS = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "session_rejects_total",
    "sessions",
    "Calls that were refused before they got a generator, by the error's reason.",
    reason=(),
)
SESSION_SECONDS = _define(
    Kind.HISTOGRAM,
    Role.GATEWAY,
    "session_length_seconds",
    "seconds",
    "From the grant of a generator to the end of the session.",
    *LENGTH_S,
)
STREAMING_SECONDS = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "streaming_seconds_total",
    "seconds",
    "Time that sessions have held a generator; divided by its own time, sessions streaming on average.",
)
ADMISSION_WAIT = _define(
    Kind.HISTOGRAM,
    Role.GATEWAY,
    "admission_wait_seconds",
    "seconds",
    "From the session's configuration to a generator that has begun.",
    *START_S,
)
TTFC = _define(
    Kind.HISTOGRAM,
    Role.GATEWAY,
    "time_to_first_chunk_seconds",
    "seconds",
    "From the session's configuration to its first chunk handed to the transport, the wait in the queue included.",
    *START_S,
)
FIRST_CHUNK_AFTER_GRANT = _define(
    Kind.HISTOGRAM,
    Role.GATEWAY,
    "first_chunk_after_grant_seconds",
    "seconds",
    "From a generator that has begun to the first chunk handed to the transport.",
    *START_S,
)
PROMPT_LATENCY = _define(
    Kind.HISTOGRAM,
    Role.GATEWAY,
    "prompt_latency_seconds",
    "seconds",
    "From a prompt's arrival at the gateway to the first chunk that shows it, handed to the transport.",
    *START_S,
)

SESSION_MOVES = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "session_moves_total",
    "moves",
    "Times that a session lost its generator and went on with another one.",
)
INTERRUPTION = _define(
    Kind.HISTOGRAM,
    Role.GATEWAY,
    "session_interruption_seconds",
    "seconds",
    "From the loss of a session's generator to the beginning of its next one.",
    *START_S,
)

# Chunks ---------------------------------------------------------------------------------------------------------------

STAGE_SECONDS = _define(
    Kind.HISTOGRAM,
    Role.REPLICA,
    "chunk_stage_seconds",
    "seconds",
    "Time of one chunk (stage text: of one batch of prompts) in one stage. queue: finished by the generator, not yet "
    "taken up by the gateway. transfer: the decoder's call without the decoder's work. prime: a decoder's cache made "
    "anew. send: from the gateway's outbox to the transport.",
    *STAGE_S,
    stage=("queue", "text", *GENERATOR_STAGES, "transfer", *DECODER_STAGES, "send"),
)
CHUNKS_SENT = _define(Kind.COUNTER, Role.GATEWAY, "chunks_sent_total", "chunks", "Chunks handed to the transport.")
FRAMES_SENT = _define(
    Kind.COUNTER, Role.GATEWAY, "frames_sent_total", "frames", "Pixel frames handed to the transport."
)
VIDEO_SECONDS = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "video_seconds_total",
    "seconds",
    "Video handed to the transport, at the session's frame rate.",
)
BYTES_SENT = _define(
    Kind.COUNTER, Role.GATEWAY, "frame_bytes_sent_total", "bytes", "Encoded frames handed to the transport."
)
REALTIME_FACTOR = _define(
    Kind.HISTOGRAM,
    Role.GATEWAY,
    "realtime_factor_ratio",
    "ratio",
    "Seconds of video in a chunk for each second since the chunk before, time spent waiting for the client left out.",
    *RATIO,
)
DEADLINE_MISSES = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "deadline_misses_total",
    "chunks",
    "Chunks that a viewer who plays at the session's frame rate, half a second behind, would have had to wait for. The "
    "viewer's clock is set again after each.",
)
SERVER_STARVED_CLIENT = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "server_starved_client_chunks_total",
    "chunks",
    "Chunks that were sent when the client had finished with all before: it was waiting for the server.",
)
CLIENT_STARVED_SERVER = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "client_starved_server_chunks_total",
    "chunks",
    "Chunks that the generator could begin only after it had waited for the client's credit.",
)
CREDIT_WAIT_SECONDS = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "credit_wait_seconds_total",
    "seconds",
    "Time that generators have waited for clients' credit.",
)
FRAMES_DROPPED = _define(
    Kind.COUNTER,
    Role.GATEWAY,
    "frames_dropped_total",
    "frames",
    "Pixel frames that were made and not sent, because the client did not keep up and had asked for that.",
)
CREDITS = _define(
    Kind.GAUGE,
    Role.GATEWAY,
    "credits_outstanding",
    "chunks",
    "Chunks that clients still allow beyond those sent, summed over sessions.",
)
UNACKED = _define(
    Kind.GAUGE,
    Role.GATEWAY,
    "unacknowledged_chunks",
    "chunks",
    "Chunks sent that clients are not finished with, summed over sessions.",
)
DRIFT_SCORE = _define(
    Kind.HISTOGRAM,
    Role.GATEWAY,
    "latent_drift_score",
    "standard deviations",
    "How far a chunk's latents are from those of the session's first seconds. mean: root mean square over the channels "
    "of the shift of the mean, in the first seconds' standard deviations. std: likewise of the logarithm of the ratio "
    "of the standard deviations.",
    *DRIFT,
    part=("mean", "std"),
)

# The generator --------------------------------------------------------------------------------------------------------

BUSY_SECONDS = _define(
    Kind.COUNTER,
    Role.GENERATOR,
    "generator_seconds_total",
    "seconds",
    "Time of generators: busy on the device, held by a session but not at work, or idle.",
    state=("busy", "held", "idle"),
)
RECACHES = _define(
    Kind.COUNTER,
    Role.GENERATOR,
    "recaches_total",
    "recaches",
    "Times that keys and values were recomputed from latents (a prompt's policy, an anchor, a restored session).",
)
DEVICE_FAULTS = _define(
    Kind.COUNTER,
    Role.GENERATOR,
    "device_faults_total",
    "faults",
    "Faults of a device, also a decoder's or a text encoder's, after which its replica is replaced.",
    reason=(),
)

# Decoder and text encoder ---------------------------------------------------------------------------------------------

PRIMES = _define(
    Kind.COUNTER,
    Role.DECODER,
    "decoder_primes_total",
    "primes",
    "Times that a decoder's cache was made anew from latents, because it was elsewhere or had been given up.",
)
DECODER_CALLS = _define(
    Kind.COUNTER,
    Role.DECODER,
    "decoder_calls_total",
    "chunks",
    "Chunks that decoders were asked for: decoded; repeated, answered from memory; missed, because the session's cache "
    "is not here.",
    outcome=("decoded", "repeated", "missed"),
)
DECODER_EVICTIONS = _define(
    Kind.COUNTER,
    Role.DECODER,
    "decoder_evictions_total",
    "sessions",
    "Temporal caches that a decoder gave up, to make room or because they were not used for long.",
)
DECODER_SESSIONS = _define(
    Kind.GAUGE, Role.DECODER, "decoder_cached_sessions", "sessions", "Sessions whose temporal cache a decoder holds."
)
TEXT_BATCH = _define(
    Kind.HISTOGRAM,
    Role.TEXT_ENCODER,
    "text_batch_prompts",
    "prompts",
    "Prompts that were encoded together.",
    *BATCH,
)
CACHE_BYTES = _define(
    Kind.GAUGE,
    Role.REPLICA,
    "cache_bytes",
    "bytes",
    "Memory of caches: kv, a generator's sessions; decoder, temporal caches and last frames; text, embeddings.",
    cache=("kv", "decoder", "text"),
)
CACHE_LIMIT_BYTES = _define(
    Kind.GAUGE,
    Role.REPLICA,
    "cache_limit_bytes",
    "bytes",
    "What the cache may grow to: kv, the largest session that is allowed; decoder and text, what is configured.",
    cache=("kv", "decoder", "text"),
)

# Admission ------------------------------------------------------------------------------------------------------------

ADMISSION_SESSIONS = _define(
    Kind.GAUGE,
    Role.ADMISSION,
    "admission_sessions",
    "sessions",
    "Sessions that admission knows: waiting for a generator; blocked, those of them that wait for their own tenant's "
    "sessions to end; granted, on their way to a generator; running.",
    state=("waiting", "blocked", "granted", "running"),
)
ADMISSION_LONGEST_WAIT = _define(
    Kind.GAUGE,
    Role.ADMISSION,
    "admission_longest_wait_seconds",
    "seconds",
    "How long the session that has waited longest has waited; 0 when nobody does.",
)
GENERATORS = _define(
    Kind.GAUGE, Role.ADMISSION, "generators", "generators", "Generator replicas that report to admission."
)
GENERATOR_PLACES = _define(
    Kind.GAUGE,
    Role.ADMISSION,
    "generator_places",
    "sessions",
    "Sessions that the generators have room for, and those that they hold or are granted.",
    state=("idle", "taken"),
)

# Every process --------------------------------------------------------------------------------------------------------

LOAD_SECONDS = _define(
    Kind.GAUGE,
    Role.REPLICA,
    "model_load_seconds",
    "seconds",
    "How long this replica took to be ready: its weights loaded, and the first passes that later ones do not pay for.",
    phase=("load", "warm_up"),
)
GC_SECONDS = _define(
    Kind.COUNTER,
    Role.REPLICA,
    "gc_pause_seconds_total",
    "seconds",
    "Time that Python's cyclic garbage collector has held the interpreter.",
)
GC_LONGEST = _define(
    Kind.GAUGE,
    Role.REPLICA,
    "gc_longest_pause_seconds",
    "seconds",
    "Longest pause of the garbage collector since the last look, some seconds ago.",
)
GPU_MEMORY = _define(
    Kind.GAUGE,
    Role.REPLICA,
    "gpu_memory_bytes",
    "bytes",
    "The replica's GPU: allocated and reserved by this process, free and total on the device. Only where there is one.",
    kind=("allocated", "reserved", "free", "total"),
)
GPU_UTILISATION = _define(
    Kind.GAUGE,
    Role.REPLICA,
    "gpu_utilisation_ratio",
    "ratio",
    "Share of the last moment in which the replica's GPU ran a kernel. Only where there is a GPU and nvidia-ml-py.",
)
COST = _define(
    Kind.COUNTER,
    Role.REPLICA,
    "cost_total",
    "currency",
    "Price of the time that this replica has run, from observability.price_per_replica_hour.",
    currency=(),
)

# Clients, without Ray -------------------------------------------------------------------------------------------------

CLIENT_TTFF = _define(
    Kind.HISTOGRAM,
    Role.CLIENT,
    "client_time_to_first_frame_seconds",
    "seconds",
    "From the call to the first frame received.",
    *START_S,
)
CLIENT_CHUNK_INTERVAL = _define(
    Kind.HISTOGRAM,
    Role.CLIENT,
    "client_chunk_interval_seconds",
    "seconds",
    "Between the last frames of two chunks received.",
    *STAGE_S,
)
CLIENT_FRAMES = _define(Kind.COUNTER, Role.CLIENT, "client_frames_total", "frames", "Frames received.")
CLIENT_BYTES = _define(Kind.COUNTER, Role.CLIENT, "client_frame_bytes_total", "bytes", "Encoded frames received.")
CLIENT_SESSIONS = _define(
    Kind.COUNTER,
    Role.CLIENT,
    "client_sessions_total",
    "sessions",
    "Sessions that ended at this client, by how.",
    outcome=("ended", "error"),
)
