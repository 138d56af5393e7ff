"""What is full, and what is slow because of it?"""

from __future__ import annotations

from serve.metrics import definitions as metrics
from serve.metrics.grafana import Dashboard, Panel, Query, Row

from .common import WHERE, rate, series, share, total, worse_above, worse_below

MEMORY = Dashboard(
    "memory",
    "GPU and memory",
    "What is full, and what is slow because of it?",
    (
        Row(
            "GPUs",
            (
                Panel(
                    "GPU memory by replica",
                    "Allocated and reserved by the replica's process. Only where there is a GPU.",
                    "bytes",
                    (
                        Query(
                            total(metrics.GPU_MEMORY, "deployment, replica", kind="allocated"), "{{replica}} allocated"
                        ),
                        Query(
                            total(metrics.GPU_MEMORY, "deployment, replica", kind="reserved"), "{{replica}} reserved"
                        ),
                    ),
                ),
                Panel(
                    "GPU memory left",
                    "Share of the device's memory that is free. Only where there is a GPU.",
                    "percentunit",
                    (
                        Query(
                            share(
                                total(metrics.GPU_MEMORY, "replica", kind="free"),
                                total(metrics.GPU_MEMORY, "replica", kind="total"),
                            ),
                            "{{replica}}",
                        ),
                    ),
                    worse_below(0.1, 0.03),
                    maximum=1,
                ),
                Panel(
                    "GPU at work",
                    "Share of the time in which a kernel runs. Only where there is a GPU and nvidia-ml-py.",
                    "percentunit",
                    (
                        Query(
                            f"max by (deployment, replica) ({series(metrics.GPU_UTILISATION)})",
                            "{{deployment}} {{replica}}",
                        ),
                    ),
                    maximum=1,
                ),
                Panel(
                    "GPU memory of nodes",
                    "All processes of each GPU, as Ray's agent sees it. Only where there is a GPU.",
                    "decmbytes",
                    (Query(f"sum by (ip, GpuIndex) (ray_node_gram_used{{{WHERE}}})", "{{ip}} GPU {{GpuIndex}}"),),
                ),
            ),
        ),
        Row(
            "Caches",
            (
                Panel(
                    "Caches",
                    "Keys and values of sessions, decoders' temporal caches, and text embeddings.",
                    "bytes",
                    (Query(total(metrics.CACHE_BYTES, "cache"), "{{cache}}"),),
                    stacked=True,
                ),
                Panel(
                    "Cache against its limit",
                    "The fullest of each kind. At its limit a decoder gives up caches, which are made anew when "
                    "needed.",
                    "percentunit",
                    (
                        Query(
                            f"max by (cache) ({series(metrics.CACHE_BYTES)} / {series(metrics.CACHE_LIMIT_BYTES)})",
                            "{{cache}}",
                        ),
                    ),
                    worse_above(0.8, 1),
                ),
                Panel(
                    "Sessions in decoders",
                    "Sessions whose temporal cache a decoder holds.",
                    "short",
                    (Query(total(metrics.DECODER_SESSIONS, "replica"), "{{replica}}"),),
                    stacked=True,
                ),
                Panel(
                    "Caches given up and made anew",
                    "A second: decoders' caches given up, decoders' caches made anew, and generators' keys and values "
                    "recomputed.",
                    "cps",
                    (
                        Query(rate(metrics.DECODER_EVICTIONS), "given up"),
                        Query(rate(metrics.PRIMES), "made anew"),
                        Query(rate(metrics.RECACHES), "recomputed"),
                    ),
                    worse_above(0.5, 2),
                ),
            ),
        ),
        Row(
            "Processes and nodes",
            (
                Panel(
                    "Garbage collection",
                    "Longest pause of Python's collector in each deployment, in the last second.",
                    "s",
                    (Query(f"max by (deployment) ({series(metrics.GC_LONGEST)})", "{{deployment}}"),),
                    worse_above(0.05, 0.25),
                ),
                Panel(
                    "Time in garbage collection",
                    "Share of a process's time; the worst process of each deployment.",
                    "percentunit",
                    (
                        Query(
                            f"max by (deployment) (rate({series(metrics.GC_SECONDS)}[$__rate_interval]))",
                            "{{deployment}}",
                        ),
                    ),
                    worse_above(0.01, 0.05),
                ),
                Panel(
                    "Memory of nodes",
                    "Share of each node's memory in use; Ray kills processes above 95 %.",
                    "percentunit",
                    (
                        Query(
                            f"max by (ip) (ray_node_mem_used{{{WHERE}}} / ray_node_mem_total{{{WHERE}}})",
                            "{{ip}}",
                        ),
                    ),
                    worse_above(0.85, 0.95),
                    maximum=1,
                ),
                Panel(
                    "Disk of nodes",
                    "Share of each node's disk in use.",
                    "percent",
                    (Query(f"max by (ip) (ray_node_disk_utilization_percentage{{{WHERE}}})", "{{ip}}"),),
                    worse_above(80, 95),
                    maximum=100,
                ),
            ),
        ),
    ),
)
