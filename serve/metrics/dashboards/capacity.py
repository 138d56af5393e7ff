"""Is there room for the next user, and does the service grow in time?"""

from __future__ import annotations

from serve.metrics import definitions as metrics
from serve.metrics.grafana import Dashboard, Panel, Query, Row

from .common import CHOSEN, PLACES, QUEUE, WHERE, rate, series, total, worse_above

CAPACITY = Dashboard(
    "capacity",
    "Capacity and autoscaling",
    "Is there room for the next user, and does the service grow in time?",
    (
        Row(
            "Room",
            (
                PLACES,
                QUEUE,
                Panel(
                    "Longest wait",
                    "How long the first session in the queue has waited.",
                    "s",
                    (
                        Query(
                            f"max ({series(metrics.ADMISSION_LONGEST_WAIT)})",
                            "first in the queue",
                        ),
                    ),
                    worse_above(10, 60),
                ),
                Panel(
                    "What generators do",
                    "Generators' time: busy on the device, held by a session but waiting (for credit, or its pace), "
                    "or idle. Held most of the time: more sessions_per_replica may fit.",
                    "short",
                    (Query(rate(metrics.BUSY_SECONDS, "state"), "{{state}}"),),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Growth",
            (
                Panel(
                    "Generators",
                    "Generators that report to admission.",
                    "short",
                    (Query(total(metrics.GENERATORS), "report"),),
                ),
                Panel(
                    "Replicas",
                    "Replicas that Serve finds healthy, and those it wants where it scales by itself.",
                    "short",
                    (
                        Query(
                            f"sum by (deployment) (ray_serve_deployment_replica_healthy{{{CHOSEN}}})", "{{deployment}}"
                        ),
                        Query(
                            f"max by (deployment) (ray_serve_autoscaling_target_replicas{{{CHOSEN}}})",
                            "{{deployment}}, wanted",
                        ),
                    ),
                ),
                Panel(
                    "Time to be ready",
                    "Of the slowest replica of each deployment: loading weights, and warming up.",
                    "s",
                    (
                        Query(
                            f"max by (deployment, phase) ({series(metrics.LOAD_SECONDS)})", "{{deployment}}, {{phase}}"
                        ),
                    ),
                    worse_above(120, 300),
                ),
                Panel(
                    "Cost an hour",
                    "Price of all replicas. Needs observability.price_per_replica_hour.",
                    "short",
                    (Query(f"3600 * {rate(metrics.COST, 'deployment, currency')}", "{{deployment}}, {{currency}}"),),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Nodes",
            (
                Panel(
                    "CPU of nodes",
                    "Share of each node's CPUs in use. Gateways and encoders suffer first.",
                    "percent",
                    (Query(f"max by (ip) (ray_node_cpu_utilization{{{WHERE}}})", "{{ip}}"),),
                    worse_above(80, 95),
                    maximum=100,
                ),
                Panel(
                    "Network of nodes",
                    "Bytes a second that each node sends.",
                    "Bps",
                    (Query(f"sum by (ip) (ray_node_network_send_speed{{{WHERE}}})", "{{ip}}"),),
                ),
            ),
        ),
    ),
)
