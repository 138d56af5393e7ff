"""Where recorded values go: Ray's metrics, prometheus-client, a test's memory, or nowhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

from .definitions import Kind, Metric

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

ALMOST_ZERO = 1e-9
"""Ray's counters refuse to count nothing, but rate() does not see the event that a series begins with."""


class Sink(Protocol):
    """Takes values; labels come in the order of the metric's definition."""

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """Count."""
        ...

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Replace a gauge's value."""
        ...

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation to a histogram."""
        ...

    def refresh(self) -> None:
        """Say every gauge's value again, where that is needed to keep it."""
        ...


class NoSink:
    """Forgets everything."""

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """Do nothing."""

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Do nothing."""

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Do nothing."""

    def refresh(self) -> None:
        """Do nothing."""


@dataclass
class MemorySink:
    """Remembers everything, for tests.

    Attributes:
        values: Sum of a counter, last value of a gauge, by ``(name, *labels)``.
        observed: Every observation of a histogram, likewise.
    """

    values: dict[tuple[str, ...], float] = field(default_factory=dict)
    observed: dict[tuple[str, ...], list[float]] = field(default_factory=dict)

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """Count."""
        check(metric, Kind.COUNTER, labels)
        key = (metric.name, *labels)
        self.values[key] = self.values.get(key, 0.0) + value

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Replace a gauge's value."""
        check(metric, Kind.GAUGE, labels)
        self.values[metric.name, *labels] = value

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation."""
        check(metric, Kind.HISTOGRAM, labels)
        self.observed.setdefault((metric.name, *labels), []).append(value)

    def refresh(self) -> None:
        """Do nothing: nothing gets lost."""


class RaySink:
    """Ray's metrics: one scrape of the node's port gets those of all its processes.

    In a Serve replica Ray adds ``application``, ``deployment`` and ``replica``; elsewhere ``fixed`` gives them.

    Ray forgets a gauge once it is reported (measured: one that was set once is gone two report intervals later), so
    each has to be said again in every interval.
    """

    def __init__(self, fixed: Mapping[str, str] | None = None) -> None:
        self._fixed = dict(fixed or {})
        self._instruments: dict[str, Any] = {}
        self._tags: dict[tuple[str, ...], dict[str, str]] = {}
        self._gauges: dict[tuple[str, ...], tuple[Metric, float]] = {}

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """Count; 0 makes the series exist."""
        self._instrument(metric).inc(value or ALMOST_ZERO, self._tags_of(metric, labels))

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Replace a gauge's value."""
        self._gauges[metric.name, *labels] = (metric, value)
        self._instrument(metric).set(value, self._tags_of(metric, labels))

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation."""
        self._instrument(metric).observe(value, self._tags_of(metric, labels))

    def refresh(self) -> None:
        """Say every gauge's value again."""
        for (_, *labels), (metric, value) in list(self._gauges.items()):
            self._instrument(metric).set(value, self._tags_of(metric, tuple(labels)))

    def _instrument(self, metric: Metric) -> Any:  # noqa: ANN401  (ray's metrics are untyped)
        found = self._instruments.get(metric.name)
        if found is None:
            found = self._instruments[metric.name] = self._create(metric)
        return found

    def _create(self, metric: Metric) -> Any:  # noqa: ANN401  (ray's metrics are untyped)
        from ray.serve import metrics

        keys: Any = (*metric.labels, *self._fixed)  # annotated as a tuple of one
        instrument: Any
        if metric.kind is Kind.HISTOGRAM:
            instrument = metrics.Histogram(metric.full_name, metric.help, list(metric.buckets), keys)
        elif metric.kind is Kind.GAUGE:
            instrument = metrics.Gauge(metric.full_name, metric.help, keys)
        else:
            instrument = metrics.Counter(metric.full_name, metric.help, keys)
        instrument.set_default_tags(dict(self._fixed))
        return instrument

    def _tags_of(self, metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
        key = (metric.name, *labels)
        tags = self._tags.get(key)
        if tags is None:
            check(metric, metric.kind, labels)
            tags = self._tags[key] = dict(zip(metric.labels, labels, strict=True))
        return tags


class PrometheusSink:
    """prometheus-client: for a process without Ray, which serves or writes the registry itself."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._instruments: dict[str, Any] = {}
        self._lock = threading.Lock()

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """Count."""
        self._child(metric, labels).inc(value)

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Replace a gauge's value."""
        self._child(metric, labels).set(value)

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation."""
        self._child(metric, labels).observe(value)

    def refresh(self) -> None:
        """Do nothing: nothing gets lost."""

    def _child(self, metric: Metric, labels: tuple[str, ...]) -> Any:  # noqa: ANN401  (counter, gauge or histogram)
        with self._lock:
            instrument = self._instruments.get(metric.name)
            if instrument is None:
                instrument = self._instruments[metric.name] = self._create(metric)
        check(metric, metric.kind, labels)
        return instrument.labels(*labels) if labels else instrument

    def _create(self, metric: Metric) -> Any:  # noqa: ANN401  (counter, gauge or histogram)
        from prometheus_client import Counter, Gauge, Histogram

        names = tuple(metric.labels)
        if metric.kind is Kind.HISTOGRAM:
            return Histogram(metric.full_name, metric.help, names, registry=self._registry, buckets=metric.buckets)
        kind = Gauge if metric.kind is Kind.GAUGE else Counter
        return kind(metric.full_name, metric.help, names, registry=self._registry)


def label_sets(metric: Metric) -> Iterator[tuple[str, ...]]:
    """Yield every combination of a metric's labels that is known beforehand; one empty tuple without labels."""
    return product(*metric.labels.values())


def check(metric: Metric, kind: Kind, labels: tuple[str, ...]) -> None:
    """Check that a value fits a metric.

    Raises:
        ValueError: If it is of another kind, or a label is missing or not one of the listed values.
    """
    if metric.kind is not kind:
        raise ValueError(f"{metric.name} is a {metric.kind}, not a {kind}")
    if len(labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has the labels {', '.join(metric.labels) or 'none'}, not {labels}")
    for (name, allowed), value in zip(metric.labels.items(), labels, strict=True):
        if allowed and value not in allowed:
            raise ValueError(f"{metric.name}: {name} is {value!r}, must be one of {', '.join(allowed)}")
