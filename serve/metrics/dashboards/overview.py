"""Can users stream?"""

from __future__ import annotations

from serve.metrics import definitions as metrics
from serve.metrics.grafana import Dashboard, Panel, Query, Row

from .common import (
    ADMISSION_WAIT,
    ALERTS,
    CALLS_BY_OUTCOME,
    DEADLINE_MISSES,
    FRAME_RATE,
    GREEN,
    PROMPT_LATENCY,
    RECORDED,
    RED,
    SESSIONS_BY_STATE,
    TTFC,
    rate,
    share,
    total,
    worse_above,
)

OVERVIEW = Dashboard(
    "overview",
    "Overview",
    "Can users stream?",
    (
        Row(
            "Now",
            (
                Panel(
                    "Streaming",
                    "Sessions that hold a generator and are not paused.",
                    "short",
                    (Query(total(metrics.SESSIONS, state="streaming"), ""),),
                    kind="stat",
                ),
                Panel(
                    "Waiting",
                    "Sessions in admission's queue.",
                    "short",
                    (Query(total(metrics.ADMISSION_SESSIONS, state="waiting"), ""),),
                    worse_above(1, 10),
                    kind="stat",
                ),
                Panel(
                    "Free places",
                    "Sessions that could begin at once.",
                    "short",
                    (Query(total(metrics.GENERATOR_PLACES, state="idle"), ""),),
                    ((None, RED), (1, GREEN)),
                    kind="stat",
                ),
                Panel(
                    "Calls that fail",
                    "Share of the calls of the last half hour that failed on the service's side; the objective is "
                    "0.5 %.",
                    "percentunit",
                    (Query(f"max (causal_forcing:calls_failed:ratio_rate30m{{{RECORDED}}})", ""),),
                    worse_above(0.005, 0.03),
                    kind="stat",
                ),
                Panel(
                    "Slow starts",
                    "Share of the sessions of the last half hour whose first chunk took more than 10 s; the objective "
                    "is 5 %.",
                    "percentunit",
                    (Query(f"max (causal_forcing:slow_starts:ratio_rate30m{{{RECORDED}}})", ""),),
                    worse_above(0.05, 0.3),
                    kind="stat",
                ),
                Panel(
                    "Late chunks",
                    "Share of chunks that came too late for a viewer half a second behind.",
                    "percentunit",
                    (Query(share(rate(metrics.DEADLINE_MISSES), rate(metrics.CHUNKS_SENT)), ""),),
                    worse_above(0.01, 0.05),
                    kind="stat",
                ),
            ),
            per_line=6,
            height=4,
        ),
        Row("Users", (SESSIONS_BY_STATE, CALLS_BY_OUTCOME, TTFC, ADMISSION_WAIT, PROMPT_LATENCY, FRAME_RATE)),
        Row("What is wrong", (ALERTS, DEADLINE_MISSES)),
    ),
)
