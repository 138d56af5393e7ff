"""docs/metrics.md, written from the table of metrics."""

from __future__ import annotations

from .definitions import ALL, Kind, Metric, Role

_HEAD = """# Metrics

<!-- written by `python -m serve.metrics`; do not edit -->

Every metric of the project, from the table in `serve/metrics/definitions.py`. In the service they are recorded through
Ray, so one scrape of a node's metrics port gets those of all its processes, with the prefix `ray_` and the labels
`application`, `deployment` and `replica`. Outside of Ray (`causal-forcing stream` and `generate` with
`--metrics-port`, the viewers of `make observe`) the same definitions go through prometheus-client, without that prefix.

- No label takes a value that a user chooses: no session ids, no prompts.
- Ray keeps only the counts of a histogram's buckets; its `_sum` is made of the buckets' middles, so an average over it
  is an estimate. Counters ending in `_seconds_total` are exact.
- A counter with listed labels exists from the start of its process, so that its first event is seen by `rate()`.
- A value is visible after Ray's report interval (10 s unless `RAY_metrics_report_interval_ms` says otherwise).
"""

_COLUMNS = "| name | type | unit | labels | meaning |\n|---|---|---|---|---|"


def render() -> str:
    """Return the page."""
    parts = [_HEAD]
    for role in Role:
        rows = [_row(metric) for metric in ALL.values() if metric.role is role]
        parts.append(f"\n## Recorded by: {role.value}\n\n{_COLUMNS}")
        parts.extend(rows)
    parts.append("\n## Buckets\n\n| histogram | upper bounds |\n|---|---|")
    parts.extend(
        f"| `{metric.full_name}` | {', '.join(f'{bound:g}' for bound in metric.buckets)} |"
        for metric in ALL.values()
        if metric.kind is Kind.HISTOGRAM
    )
    return "\n".join(parts) + "\n"


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{name}`" + _values(values) for name, values in metric.labels.items()) or "-"
    return f"| `{metric.full_name}` | {metric.kind.value} | {metric.unit} | {labels} | {metric.help} |"


def _values(values: tuple[str, ...]) -> str:
    return f" ({', '.join(values)})" if values else ""
