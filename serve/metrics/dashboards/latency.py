"""Where does a chunk's time go?"""

from __future__ import annotations

from serve.metrics import definitions as metrics
from serve.metrics.grafana import Dashboard, Panel, Query, Row

from .common import (
    CHOSEN,
    DEADLINE_MISSES,
    PROMPT_LATENCY,
    REALTIME_FACTOR,
    TTFC,
    quantile,
    quantiles,
    rate,
    share,
    worse_above,
)

LATENCY = Dashboard(
    "latency",
    "Latency by stage",
    "Where does a chunk's time go?",
    (
        Row(
            "Stages",
            (
                Panel(
                    "Usual time by stage",
                    "Half of the chunks take less in this stage. docs/metrics.md says where a stage begins and ends.",
                    "s",
                    (Query(quantile(0.5, metrics.STAGE_SECONDS, "stage"), "{{stage}}"),),
                    worse_above(0.2, 0.75),
                ),
                Panel(
                    "Bad time by stage",
                    "One chunk in twenty takes longer in this stage.",
                    "s",
                    (Query(quantile(0.95, metrics.STAGE_SECONDS, "stage"), "{{stage}}"),),
                    worse_above(0.2, 0.75),
                ),
                Panel(
                    "Worst time by stage",
                    "One chunk in a hundred takes longer in this stage.",
                    "s",
                    (Query(quantile(0.99, metrics.STAGE_SECONDS, "stage"), "{{stage}}"),),
                    worse_above(0.2, 0.75),
                ),
                Panel(
                    "Mean time by stage, stacked",
                    "What the stages add up to for one chunk. Made of the buckets' middles, so an estimate.",
                    "s",
                    (
                        Query(
                            share(
                                rate(metrics.STAGE_SECONDS, "stage", "_sum"),
                                rate(metrics.STAGE_SECONDS, "stage", "_count"),
                            ),
                            "{{stage}}",
                        ),
                    ),
                    stacked=True,
                ),
            ),
        ),
        Row("What a viewer notices", (PROMPT_LATENCY, TTFC, REALTIME_FACTOR, DEADLINE_MISSES)),
        Row(
            "Between processes",
            (
                Panel(
                    "Prompts encoded together",
                    "Size of the text encoder's batches.",
                    "short",
                    quantiles(metrics.TEXT_BATCH),
                ),
                Panel(
                    "Calls in replicas",
                    "Calls that Serve counts as under way in each deployment; for gateways and generators, sessions.",
                    "short",
                    (
                        Query(
                            f"sum by (deployment) (ray_serve_replica_processing_queries{{{CHOSEN}}})", "{{deployment}}"
                        ),
                    ),
                ),
            ),
        ),
    ),
)
