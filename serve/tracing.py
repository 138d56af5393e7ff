"""Traces of sessions for OpenTelemetry: one trace a session, a span for each chunk, and in it one for each stage.

All spans are made by the gateway, from what generators and decoders say about each chunk, so that tracing costs the
device nothing. Stages at a generator are placed by its clock; those of a decoder in the middle of the gateway's call.
Prompts are never in a trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from .messages import Decoded, GeneratedChunk

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from .config import TracingConfig

NAME = "causal-forcing"
"""Of the service and of the instrumentation."""

SECOND_NS = 1_000_000_000


class Trace(Protocol):
    """Hears what happens in one session."""

    def configured(self) -> None:
        """The session's configuration came."""
        ...

    def started(self, session_id: str) -> None:
        """The session got a generator."""
        ...

    def moved(self, reason: str) -> None:
        """The session went on with another generator."""
        ...

    def chunk(self, chunk: GeneratedChunk, decoded: Decoded, took_s: float) -> None:
        """A chunk was decoded by a call that took so long, and is about to be sent."""
        ...

    def sent(self, index: int) -> None:
        """A chunk was handed to the transport."""
        ...

    def failed(self, reason: str) -> None:
        """The session ended with an error."""
        ...

    def close(self) -> None:
        """The call is over."""
        ...


class NoTrace:
    """Forgets everything."""

    def configured(self) -> None:
        """Do nothing."""

    def started(self, session_id: str) -> None:
        """Do nothing."""

    def moved(self, reason: str) -> None:
        """Do nothing."""

    def chunk(self, chunk: GeneratedChunk, decoded: Decoded, took_s: float) -> None:
        """Do nothing."""

    def sent(self, index: int) -> None:
        """Do nothing."""

    def failed(self, reason: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


UNTRACED: Trace = NoTrace()
"""For a session that nobody follows."""


class SessionTrace:
    """The spans of one session.

    Args:
        tracer: OpenTelemetry's.
        parent: From the client's metadata; the session's span is a child of it.
    """

    def __init__(self, tracer: Tracer, parent: Context) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._tracer = tracer
        self._session = tracer.start_span("session", parent, SpanKind.SERVER)
        self._inside = set_span_in_context(self._session, parent)
        self._wait: Span | None = None
        self._chunks: dict[int, tuple[Span, int]] = {}

    def configured(self) -> None:
        """Begin the wait for a generator."""
        if self._wait is None:
            self._wait = self._tracer.start_span("wait", self._inside)

    def started(self, session_id: str) -> None:
        """End the wait."""
        self._session.set_attribute("causal_forcing.session_id", session_id)
        if self._wait is not None:
            self._wait.end()

    def moved(self, reason: str) -> None:
        """Note that the session went on with another generator."""
        self._session.add_event("moved", {"causal_forcing.reason": reason})

    def chunk(self, chunk: GeneratedChunk, decoded: Decoded, took_s: float) -> None:
        """Begin a chunk's span where its generation began, with the stages that are behind it."""
        if not self._session.is_recording():
            return
        now_ns, took_ns = time.time_ns(), _ns(took_s)
        made_ns = min(_ns(chunk.made_s), now_ns - took_ns) if chunk.made_s else now_ns - took_ns
        begun_ns = made_ns - _ns(chunk.denoise_s)
        span = self._tracer.start_span("chunk", self._inside, start_time=begun_ns)
        span.set_attribute("causal_forcing.chunk_index", chunk.index)
        span.set_attribute("causal_forcing.credit_wait_s", chunk.credit_wait_s)
        span.set_attribute("causal_forcing.recaches", chunk.recaches)
        context_ns = made_ns - _ns(chunk.context_s)
        self._stage(span, "denoise", begun_ns, context_ns)
        self._stage(span, "context", context_ns, made_ns)
        self._stage(span, "queue", made_ns, now_ns - took_ns)
        self._decoder(span, decoded, now_ns - took_ns, now_ns)
        self._chunks[chunk.index] = (span, now_ns)

    def sent(self, index: int) -> None:
        """End a chunk's span; those before it that were left out end with it."""
        now_ns = time.time_ns()
        for earlier in [number for number in self._chunks if number <= index]:
            span, queued_ns = self._chunks.pop(earlier)
            if earlier == index:
                self._stage(span, "send", queued_ns, now_ns)
            else:
                span.set_attribute("causal_forcing.dropped", value=True)
            span.end(now_ns)

    def failed(self, reason: str) -> None:
        """Mark the session as failed."""
        from opentelemetry.trace import StatusCode

        self._session.set_attribute("causal_forcing.reason", reason)
        self._session.set_status(StatusCode.ERROR, reason)

    def close(self) -> None:
        """End all spans."""
        for span, _ in self._chunks.values():
            span.end()
        self._chunks.clear()
        if self._wait is not None and self._wait.is_recording():
            self._wait.end()
        self._session.end()

    def _decoder(self, chunk: Span, decoded: Decoded, begun_ns: int, ended_ns: int) -> None:
        """Add the decoder's call, and its stages in the middle of it."""
        call = self._stage(chunk, "decoder call", begun_ns, ended_ns)
        stages = {"prime": decoded.prime_s, "decode": decoded.decode_s, "encode": decoded.encode_s}
        at_ns = begun_ns + max(0, ended_ns - begun_ns - sum(map(_ns, stages.values()))) // 2
        for name, seconds in stages.items():
            if seconds:
                self._stage(call, name, at_ns, at_ns + _ns(seconds))
                at_ns += _ns(seconds)

    def _stage(self, parent: Span, name: str, begun_ns: int, ended_ns: int) -> Span:
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(name, set_span_in_context(parent, self._inside), start_time=begun_ns)
        span.end(max(begun_ns, ended_ns))
        return span


class Tracing:
    """Makes a trace for each session of a gateway, or none.

    Args:
        config: Where traces go; None makes none.
        instance: Name of the gateway's replica.
        exporter: Instead of one to the configured address, for tests.
    """

    def __init__(self, config: TracingConfig | None, instance: str, exporter: SpanExporter | None = None) -> None:
        self._tracer: Tracer | None = None
        self._provider: Any = None
        if config is not None:
            self._start(config, instance, exporter)

    def session(self, metadata: Iterable[tuple[str, str | bytes]]) -> Trace:
        """Return the trace of a session, a part of the client's if its metadata has a ``traceparent``."""
        if self._tracer is None:
            return UNTRACED
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        return SessionTrace(self._tracer, TraceContextTextMapPropagator().extract(carrier))

    def close(self) -> None:
        """Send what has not been sent."""
        if self._provider is not None:
            self._provider.shutdown()

    def _start(self, config: TracingConfig, instance: str, exporter: SpanExporter | None) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": NAME, "service.instance.id": instance}),
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        )
        target = exporter or OTLPSpanExporter(endpoint=config.endpoint, insecure=not config.tls)
        self._provider.add_span_processor(BatchSpanProcessor(target))
        self._tracer = self._provider.get_tracer(NAME)


def _ns(seconds: float) -> int:
    return int(seconds * SECOND_NS)
