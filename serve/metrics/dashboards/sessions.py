"""What do users get, and what do they cost?"""

from __future__ import annotations

from serve.metrics import definitions as metrics
from serve.metrics.grafana import Dashboard, Panel, Query, Row

from .common import (
    ADMISSION_WAIT,
    CALLS_BY_OUTCOME,
    FRAME_RATE,
    PROMPT_LATENCY,
    REALTIME_FACTOR,
    SESSIONS_BY_STATE,
    TTFC,
    quantile,
    quantiles,
    rate,
    share,
    total,
    worse_above,
)

SESSIONS = Dashboard(
    "sessions",
    "Sessions",
    "What do users get, and what do they cost?",
    (
        Row(
            "Coming and going",
            (
                SESSIONS_BY_STATE,
                Panel(
                    "Sessions that begin",
                    "Sessions that got a generator, a second.",
                    "cps",
                    (Query(rate(metrics.SESSIONS_STARTED), "begin"),),
                ),
                CALLS_BY_OUTCOME,
                Panel(
                    "Length of sessions",
                    "From the grant of a generator to the end, of sessions that ended.",
                    "s",
                    quantiles(metrics.SESSION_SECONDS),
                ),
            ),
        ),
        Row(
            "The start",
            (
                TTFC,
                ADMISSION_WAIT,
                Panel(
                    "First chunk after the grant",
                    "From a generator that has begun to the first chunk: text, denoising and decoding of one chunk.",
                    "s",
                    quantiles(metrics.FIRST_CHUNK_AFTER_GRANT),
                    worse_above(2, 5),
                ),
                PROMPT_LATENCY,
            ),
        ),
        Row(
            "Who waits for whom",
            (
                FRAME_RATE,
                REALTIME_FACTOR,
                Panel(
                    "Starvation",
                    "Shares of chunks. The server starved the client: it had nothing left when the chunk was sent. The "
                    "client starved the server: the generator had to wait for credit, as it does by design when it is "
                    "faster than the video.",
                    "percentunit",
                    (
                        Query(share(rate(metrics.SERVER_STARVED_CLIENT), rate(metrics.CHUNKS_SENT)), "client waits"),
                        Query(share(rate(metrics.CLIENT_STARVED_SERVER), rate(metrics.CHUNKS_SENT)), "server waits"),
                    ),
                    maximum=1,
                ),
                Panel(
                    "Time generators wait for credit",
                    "Share of the time that sessions hold a generator in which it waits for its client.",
                    "percentunit",
                    (Query(share(rate(metrics.CREDIT_WAIT_SECONDS), rate(metrics.STREAMING_SECONDS)), "waiting"),),
                    worse_above(0.5, 0.8),
                ),
                Panel(
                    "Credit",
                    "Chunks that clients still allow, and chunks they have not finished with, over all sessions.",
                    "short",
                    (
                        Query(total(metrics.CREDITS), "still allowed"),
                        Query(total(metrics.UNACKED), "not acknowledged"),
                    ),
                ),
                Panel(
                    "Frames dropped",
                    "Frames a second that were made and not sent, in sessions that asked for the latest frame alone.",
                    "short",
                    (Query(rate(metrics.FRAMES_DROPPED), "dropped"),),
                    worse_above(1, 16),
                ),
            ),
        ),
        Row(
            "What it is worth",
            (
                Panel(
                    "Bytes out",
                    "Encoded frames handed to the transport.",
                    "Bps",
                    (Query(rate(metrics.BYTES_SENT), "all sessions"),),
                ),
                Panel(
                    "Bytes of a second of video",
                    "What a viewer's connection has to carry.",
                    "bytes",
                    (Query(share(rate(metrics.BYTES_SENT), rate(metrics.VIDEO_SECONDS)), "mean"),),
                ),
                Panel(
                    "Drift",
                    "Distance of latents from those of a session's first seconds, in their standard deviations: nine "
                    "chunks in ten are nearer. Above 1 is worth a look at the videos.",
                    "short",
                    (Query(quantile(0.9, metrics.DRIFT_SCORE, "part"), "{{part}}"),),
                    worse_above(0.75, 1),
                ),
                Panel(
                    "Cost of a session-minute",
                    "Price of all replicas' time, divided by the minutes in which sessions held a generator. Needs "
                    "observability.price_per_replica_hour, and all deployments chosen.",
                    "short",
                    (
                        Query(
                            f"60 * {rate(metrics.COST, 'currency')} / on () group_left () "
                            f"{rate(metrics.STREAMING_SECONDS)}",
                            "{{currency}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)
