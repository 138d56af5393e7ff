"""What the service's processes say about themselves: one recorder a process, one method an event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from . import definitions as metrics
from .definitions import Kind, Role
from .sinks import NoSink, Sink, label_sets

_OUTCOMES: Mapping[str, str] = {"RESOURCE_EXHAUSTED": "refused", "UNAVAILABLE": "failed", "INTERNAL": "failed"}
"""Outcome of a call by the code it failed with; any other is the client's own doing."""

_DRAINING = "REPLICA_DRAINING"
"""Reason of calls that are sent to another gateway, or to a newer version, before they begin."""


class Recorder:
    """Records events of one process. Calls come from any of its threads."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink or NoSink()
        self._states: Counter[str] = Counter()
        self._credits = self._unacked = 0
        self._totals: Counter[str] = Counter()

    def begin(self, *roles: Role) -> None:
        """Make the series of a process exist, so that its first event is seen as one."""
        for metric in metrics.ALL.values():
            if metric.role in roles and all(metric.labels.values()):
                for labels in label_sets(metric):
                    if metric.kind is Kind.COUNTER:
                        self._sink.add(metric, 0.0, *labels)

    # The gateway

    def session_state(self, before: str | None, after: str | None) -> None:
        """A session goes from one state to another; None before its beginning and after its end."""
        for state, change in ((before, -1), (after, 1)):
            if state is not None:
                self._states[state] += change
                self._sink.set(metrics.SESSIONS, self._states[state], state)

    def session_started(self, waited_s: float) -> None:
        """A session got a generator."""
        self._sink.add(metrics.SESSIONS_STARTED, 1)
        self._sink.observe(metrics.ADMISSION_WAIT, waited_s)

    def session_moved(self, interruption_s: float) -> None:
        """A session went on with another generator."""
        self._sink.add(metrics.SESSION_MOVES, 1)
        self._sink.observe(metrics.INTERRUPTION, interruption_s)

    def session_lasted(self, seconds: float) -> None:
        """A session that had a generator ended."""
        self._sink.observe(metrics.SESSION_SECONDS, seconds)

    def session_served(self) -> None:
        """A call ended as asked."""
        self._sink.add(metrics.SESSIONS_FINISHED, 1, "served")

    def session_left(self) -> None:
        """A client cancelled its call."""
        self._sink.add(metrics.SESSIONS_FINISHED, 1, "client")

    def session_failed(self, code: str, reason: str, *, started: bool) -> None:
        """A call ended with an error.

        Args:
            code: Name of the gRPC status code.
            reason: Stable reason of the error.
            started: Whether the session had got a generator.
        """
        outcome = "refused" if reason == _DRAINING else _OUTCOMES.get(code, "client")
        self._sink.add(metrics.SESSIONS_FINISHED, 1, outcome)
        self._sink.add(metrics.SESSION_ERRORS, 1, reason)
        if not started:
            self._sink.add(metrics.SESSION_REJECTS, 1, reason)

    def first_chunk(self, since_config_s: float, since_grant_s: float) -> None:
        """A session's first chunk was sent."""
        self._sink.observe(metrics.TTFC, since_config_s)
        self._sink.observe(metrics.FIRST_CHUNK_AFTER_GRANT, since_grant_s)

    def prompt_shown(self, seconds: float) -> None:
        """The first chunk under a prompt was sent."""
        self._sink.observe(metrics.PROMPT_LATENCY, seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """A chunk has passed a stage."""
        self._sink.observe(metrics.STAGE_SECONDS, max(0.0, seconds), stage)

    def chunk_sent(self, frames: int, nbytes: int, video_s: float) -> None:
        """A chunk was handed to the transport."""
        self._sink.add(metrics.CHUNKS_SENT, 1)
        self._sink.add(metrics.FRAMES_SENT, frames)
        self._sink.add(metrics.BYTES_SENT, nbytes)
        self._sink.add(metrics.VIDEO_SECONDS, video_s)

    def pace(self, realtime_factor: float, *, missed: bool) -> None:
        """A chunk after the first was sent, at that pace; it may have missed its deadline."""
        self._sink.observe(metrics.REALTIME_FACTOR, realtime_factor)
        if missed:
            self._sink.add(metrics.DEADLINE_MISSES, 1)

    def client_was_waiting(self) -> None:
        """A chunk was sent to a client that had nothing left."""
        self._sink.add(metrics.SERVER_STARVED_CLIENT, 1)

    def frames_dropped(self, frames: int) -> None:
        """Frames were left out for a slow client."""
        self._sink.add(metrics.FRAMES_DROPPED, frames)

    def credit_wait(self, seconds: float) -> None:
        """A generator waited for credit before a chunk."""
        self._sink.add(metrics.CLIENT_STARVED_SERVER, 1)
        self._sink.add(metrics.CREDIT_WAIT_SECONDS, seconds)

    def credit(self, credits_change: int, unacked_change: int) -> None:
        """The chunks that a client still allows, and those it is not finished with, have changed."""
        self._credits += credits_change
        self._unacked += unacked_change
        self._sink.set(metrics.CREDITS, self._credits)
        self._sink.set(metrics.UNACKED, self._unacked)

    def drift(self, mean: float, std: float) -> None:
        """A chunk's latents are so far from those of its session's first seconds."""
        self._sink.observe(metrics.DRIFT_SCORE, mean, "mean")
        self._sink.observe(metrics.DRIFT_SCORE, std, "std")

    # The generator

    def generator_spent(self, state: str, seconds: float) -> None:
        """A generator was busy, held or idle for some more time."""
        self._sink.add(metrics.BUSY_SECONDS, seconds, state)

    def recached(self, times: int) -> None:
        """Keys and values were recomputed before a chunk."""
        self._sink.add(metrics.RECACHES, times)

    def device_fault(self, reason: str) -> None:
        """The process's device failed."""
        self._sink.add(metrics.DEVICE_FAULTS, 1, reason)

    # The decoder and the text encoder

    def primed(self, seconds: float) -> None:
        """A decoder made a session's cache anew."""
        self._sink.add(metrics.PRIMES, 1)
        self.stage("prime", seconds)

    def decoder_cache(self, sessions: int, nbytes: int) -> None:
        """A decoder's cache has changed."""
        self._sink.set(metrics.DECODER_SESSIONS, sessions)
        self.cache("decoder", nbytes)

    def decoder_totals(self, *, evicted: int, **calls: int) -> None:
        """A decoder has done so much since it began (decoded, repeated, missed)."""
        for result, total in calls.items():
            self._sink.add(metrics.DECODER_CALLS, self._more(result, total), result)
        self._sink.add(metrics.DECODER_EVICTIONS, self._more("evicted", evicted))

    def _more(self, name: str, total: int) -> int:
        """Return by how much a total has grown since the last call."""
        more = total - self._totals[name]
        self._totals[name] = total
        return more

    def text_batch(self, prompts: int, seconds: float) -> None:
        """Prompts were encoded together."""
        self._sink.observe(metrics.TEXT_BATCH, prompts)
        self.stage("text", seconds)

    def cache(self, cache: str, nbytes: int) -> None:
        """A cache has this size now."""
        self._sink.set(metrics.CACHE_BYTES, nbytes, cache)

    def cache_limit(self, cache: str, nbytes: int) -> None:
        """A cache may grow to this size."""
        self._sink.set(metrics.CACHE_LIMIT_BYTES, nbytes, cache)

    # Admission

    def admission(self, counts: Mapping[str, int], longest_wait_s: float) -> None:
        """The queue and the generators stand like this (see ``AdmissionBook.counts``)."""
        for state in ("waiting", "blocked", "granted", "running"):
            self._sink.set(metrics.ADMISSION_SESSIONS, counts[state], state)
        self._sink.set(metrics.ADMISSION_LONGEST_WAIT, longest_wait_s)
        self._sink.set(metrics.GENERATORS, counts["generators"])
        self._sink.set(metrics.GENERATOR_PLACES, counts["idle"], "idle")
        self._sink.set(metrics.GENERATOR_PLACES, counts["granted"] + counts["running"], "taken")

    # Every process

    def elapsed(self, seconds: float) -> None:
        """So much time has passed: sessions have streamed meanwhile, and gauges are due to be said again."""
        self._sink.refresh()
        streaming = self._states["streaming"] + self._states["paused"]
        if streaming:
            self._sink.add(metrics.STREAMING_SECONDS, streaming * seconds)

    def ready(self, load_s: float, warm_up_s: float) -> None:
        """A replica has loaded its model and is warm."""
        self._sink.set(metrics.LOAD_SECONDS, load_s, "load")
        self._sink.set(metrics.LOAD_SECONDS, warm_up_s, "warm_up")

    def collected(self, paused_s: float, longest_s: float) -> None:
        """The garbage collector has held the interpreter for so long since the last call."""
        self._sink.add(metrics.GC_SECONDS, paused_s)
        self._sink.set(metrics.GC_LONGEST, longest_s)

    def gpu_memory(self, **nbytes: int) -> None:
        """The GPU's memory stands like this (allocated, reserved, free, total)."""
        for kind, size in nbytes.items():
            self._sink.set(metrics.GPU_MEMORY, size, kind)

    def gpu_utilisation(self, ratio: float) -> None:
        """So much of the last moment the GPU ran a kernel."""
        self._sink.set(metrics.GPU_UTILISATION, ratio)

    def cost(self, amount: float, currency: str) -> None:
        """The replica's time has cost that much more."""
        self._sink.add(metrics.COST, amount, currency)

    # A client

    def client_first_frame(self, seconds: float) -> None:
        """The first frame came."""
        self._sink.observe(metrics.CLIENT_TTFF, seconds)

    def client_frame(self, nbytes: int) -> None:
        """A frame came."""
        self._sink.add(metrics.CLIENT_FRAMES, 1)
        self._sink.add(metrics.CLIENT_BYTES, nbytes)

    def client_chunk(self, interval_s: float) -> None:
        """A chunk was complete so long after the one before."""
        self._sink.observe(metrics.CLIENT_CHUNK_INTERVAL, interval_s)

    def client_session(self, *, failed: bool) -> None:
        """A session ended at the client."""
        self._sink.add(metrics.CLIENT_SESSIONS, 1, "error" if failed else "ended")


SILENT = Recorder()
"""For a process that nobody watches."""
