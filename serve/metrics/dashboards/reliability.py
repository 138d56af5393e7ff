"""What breaks, and do users notice?"""

from __future__ import annotations

from serve.metrics import definitions as metrics
from serve.metrics.grafana import Dashboard, Panel, Query, Row

from .common import ALERTS, CHOSEN, RECORDED, quantiles, rate, series, total, worse_above

RELIABILITY = Dashboard(
    "reliability",
    "Reliability",
    "What breaks, and do users notice?",
    (
        Row(
            "Objectives",
            (
                Panel(
                    "Burn rate: calls that fail",
                    "1 spends a month's budget (0.5 % of calls) in a month; 14.4 spends it in two days.",
                    "short",
                    tuple(
                        Query(f"causal_forcing:calls_failed:ratio_rate{window}{{{RECORDED}}} / 0.005", window)
                        for window in ("5m", "1h", "6h")
                    ),
                    worse_above(6, 14.4),
                ),
                Panel(
                    "Burn rate: slow starts",
                    "1 spends a month's budget (5 % of sessions start after 10 s) in a month; 14.4 in two days.",
                    "short",
                    tuple(
                        Query(f"causal_forcing:slow_starts:ratio_rate{window}{{{RECORDED}}} / 0.05", window)
                        for window in ("5m", "1h", "6h")
                    ),
                    worse_above(6, 14.4),
                ),
            ),
        ),
        Row(
            "Errors",
            (
                Panel(
                    "Errors by reason",
                    "Calls a second that ended with an error; docs/api.md explains each reason.",
                    "cps",
                    (Query(rate(metrics.SESSION_ERRORS, "reason"), "{{reason}}"),),
                    worse_above(0.1, 1),
                ),
                Panel(
                    "Refused by reason",
                    "Those of them that had not got a generator.",
                    "cps",
                    (Query(rate(metrics.SESSION_REJECTS, "reason"), "{{reason}}"),),
                    worse_above(0.1, 1),
                ),
            ),
        ),
        Row(
            "Faults that sessions outlive",
            (
                Panel(
                    "Moves",
                    "Sessions in the last quarter of an hour that lost their generator and went on with another one.",
                    "short",
                    (Query(f"sum (increase({series(metrics.SESSION_MOVES)}[15m]))", "moves"),),
                    worse_above(1, 3),
                ),
                Panel(
                    "Interruptions",
                    "How long a session that moved stood still.",
                    "s",
                    quantiles(metrics.INTERRUPTION),
                    worse_above(5, 20),
                ),
                Panel(
                    "Device faults",
                    "Faults of generators' devices since their processes began. A process ends soon after one, so "
                    "moves are the surer sign.",
                    "short",
                    (Query(total(metrics.DEVICE_FAULTS, "reason"), "{{reason}}"),),
                    worse_above(1, 2),
                ),
                Panel(
                    "Decoder calls by outcome",
                    "Chunks a second: decoded, answered again from memory, or missed and sent again with what came "
                    "before.",
                    "cps",
                    (Query(rate(metrics.DECODER_CALLS, "outcome"), "{{outcome}}"),),
                ),
            ),
        ),
        Row(
            "Replicas",
            (
                Panel(
                    "Replicas that are not healthy",
                    "Replicas whose health check fails, by deployment.",
                    "short",
                    (
                        Query(
                            f"sum by (deployment) (1 - ray_serve_deployment_replica_healthy{{{CHOSEN}}})",
                            "{{deployment}}",
                        ),
                    ),
                    worse_above(1, 2),
                ),
                ALERTS,
            ),
        ),
    ),
)
