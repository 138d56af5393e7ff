"""What dashboards share: how an expression is written, and panels that are on several."""

from __future__ import annotations

from serve.metrics import definitions as metrics
from serve.metrics.definitions import Metric
from serve.metrics.grafana import Panel, Query

WHERE = 'ray_cluster=~"$cluster", namespace=~"$namespace"'
CHOSEN = f'{WHERE}, deployment=~"$deployment"'
RECORDED = 'namespace=~"$namespace"'

GREEN, YELLOW, RED = "green", "yellow", "red"
Steps = tuple[tuple[float | None, str], ...]


def worse_above(yellow: float, red: float) -> Steps:
    """Return colours of a value that should be small."""
    return ((None, GREEN), (yellow, YELLOW), (red, RED))


def worse_below(yellow: float, red: float) -> Steps:
    """Return colours of a value that should be large; ``red`` is the lower one."""
    return ((None, RED), (red, YELLOW), (yellow, GREEN))


def series(metric: Metric, suffix: str = "", **labels: str) -> str:
    """Return a metric's series of what is chosen."""
    matched = "".join(f', {name}="{value}"' for name, value in labels.items())
    return f"ray_{metric.full_name}{suffix}{{{CHOSEN}{matched}}}"


def total(metric: Metric, by: str = "", **labels: str) -> str:
    """Return the sum of a gauge over processes."""
    return f"sum{_by(by)} ({series(metric, **labels)})"


def rate(metric: Metric, by: str = "", suffix: str = "", **labels: str) -> str:
    """Return a counter's growth a second, summed over processes."""
    return f"sum{_by(by)} (rate({series(metric, suffix, **labels)}[$__rate_interval]))"


def quantile(q: float, metric: Metric, by: str = "", **labels: str) -> str:
    """Return a quantile of a histogram over all processes."""
    by = f"le, {by}" if by else "le"
    return f"histogram_quantile({q:g}, {rate(metric, by, '_bucket', **labels)})"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def share(of: str, whole: str) -> str:
    """Return one sum as a share of another."""
    return f"{of} / {whole}"


def quantiles(metric: Metric) -> tuple[Query, ...]:
    """Return the usual and the bad case."""
    return (Query(quantile(0.5, metric), "half"), Query(quantile(0.95, metric), "95 of 100"))


SESSIONS_BY_STATE = Panel(
    "Sessions by state",
    "What gateways carry: waiting for a generator, streaming, or paused by their clients.",
    "short",
    (Query(total(metrics.SESSIONS, "state"), "{{state}}"),),
    stacked=True,
)
CALLS_BY_OUTCOME = Panel(
    "Calls that ended, by outcome",
    "A second. served: as asked. client: ended or spoilt by the client. refused: no room. failed: our fault.",
    "cps",
    (Query(rate(metrics.SESSIONS_FINISHED, "outcome"), "{{outcome}}"),),
    stacked=True,
)
TTFC = Panel(
    "Time to first chunk",
    "From a session's configuration to its first chunk, the wait for a generator included. The objective is 10 s for "
    "95 of 100.",
    "s",
    quantiles(metrics.TTFC),
    worse_above(5, 10),
)
ADMISSION_WAIT = Panel(
    "Wait for a generator",
    "The part of the time to first chunk that is spent in the queue.",
    "s",
    quantiles(metrics.ADMISSION_WAIT),
    worse_above(2, 10),
)
PROMPT_LATENCY = Panel(
    "Prompt latency",
    "From a prompt's arrival to the first chunk that shows it. Chunks already made or under way come before it.",
    "s",
    quantiles(metrics.PROMPT_LATENCY),
    worse_above(1.5, 3),
)
FRAME_RATE = Panel(
    "Frames a second of a session",
    "Frames handed to the transport for each second that a session has held a generator, pauses included.",
    "short",
    (Query(share(rate(metrics.FRAMES_SENT), rate(metrics.STREAMING_SECONDS)), "mean"),),
    worse_below(15, 12),
)
REALTIME_FACTOR = Panel(
    "Real-time factor",
    "Seconds of video made in a second. A session paced in real time is near 1 by its own wish; below 1 a viewer "
    "waits.",
    "short",
    (
        Query(quantile(0.1, metrics.REALTIME_FACTOR), "10 of 100 are slower"),
        Query(quantile(0.5, metrics.REALTIME_FACTOR), "half"),
    ),
    worse_below(1, 0.9),
)
DEADLINE_MISSES = Panel(
    "Chunks that came too late",
    "Share of chunks for which a viewer half a second behind had to wait.",
    "percentunit",
    (Query(share(rate(metrics.DEADLINE_MISSES), rate(metrics.CHUNKS_SENT)), "late"),),
    worse_above(0.01, 0.05),
)
ALERTS = Panel(
    "Alerts",
    "Alerts of this project that are firing; docs/runbook.md has an entry for each. Empty is good.",
    "short",
    (Query(f'count by (alertname) (ALERTS{{alertname=~"CausalForcing.*", alertstate="firing", {RECORDED}}})',
           "{{alertname}}"),),
    ((None, GREEN), (1, RED)),
    stacked=True,
)  # fmt: skip
PLACES = Panel(
    "Places",
    "Sessions that generators have room for: idle, or taken.",
    "short",
    (Query(total(metrics.GENERATOR_PLACES, "state"), "{{state}}"),),
    stacked=True,
)
QUEUE = Panel(
    "Queue",
    "Sessions that admission knows. blocked are those of the waiting ones that wait for their own tenant's sessions.",
    "short",
    (Query(total(metrics.ADMISSION_SESSIONS, "state"), "{{state}}"),),
    worse_above(5, 20),
)
