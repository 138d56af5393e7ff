"""Dashboards as values, and as the JSON that Grafana imports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

GRAFANA_SCHEMA = 39
"""Version of the dashboard's JSON; Grafana 10.4 and newer read it. Source: grafana.com/docs, dashboard JSON model."""

COLUMNS = 24
"""Width of a dashboard."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
EVERYWHERE = "ray_causal_forcing_gc_pause_seconds_total"
"""A series that every replica has: the variables' values are those of its labels."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One expression of a panel.

    Attributes:
        expr: In PromQL.
        legend: What a line is called.
    """

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: Short.
        description: What it shows, and what to make of it.
        unit: Grafana's name of the unit.
        queries: What is drawn.
        thresholds: Colours by the value from which they hold; the first is that of everything below the second.
        kind: ``timeseries`` or ``stat``.
        stacked: Whether lines are stacked.
        maximum: Where the axis ends, if it is known.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    thresholds: tuple[tuple[float | None, str], ...] = ((None, "green"),)
    kind: str = "timeseries"
    stacked: bool = False
    maximum: float | None = None


@dataclass(frozen=True)
class Row:
    """Panels under a heading.

    Attributes:
        title: The heading.
        panels: In order of reading.
        per_line: Panels beside each other.
        height: Of each, in Grafana's units.
    """

    title: str
    panels: tuple[Panel, ...]
    per_line: int = 2
    height: int = 8


@dataclass(frozen=True)
class Dashboard:
    """One dashboard.

    Attributes:
        name: Of its file; ``causal-forcing-`` and this is its id in Grafana.
        title: For people.
        description: Which question it answers.
        rows: From the top.
    """

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels."""
        return tuple(panel for row in self.rows for panel in row.panels)


def render(dashboard: Dashboard) -> str:
    """Return a dashboard's JSON."""
    document: Json = {
        "uid": f"causal-forcing-{dashboard.name}",
        "title": f"Causal Forcing: {dashboard.title}",
        "description": dashboard.description,
        "tags": ["causal-forcing"],
        "schemaVersion": GRAFANA_SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {"list": []},
        "links": [_link()],
        "templating": {"list": _variables()},
        "panels": list(_place(dashboard.rows)),
    }
    return json.dumps(document, indent=1) + "\n"


def _place(rows: Sequence[Row]) -> Iterator[Json]:
    """Yield the panels with their places: rows from the top, each line from the left."""
    top = number = 0
    for row in rows:
        number += 1
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"type": "row", "id": number, "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        width = COLUMNS // row.per_line
        for index, panel in enumerate(row.panels):
            number += 1
            line, column = divmod(index, row.per_line)
            place = {"x": column * width, "y": top + line * row.height, "w": width, "h": row.height}
            yield _panel(panel, number, place)
        top += row.height * -(-len(row.panels) // row.per_line)


def _panel(panel: Panel, number: int, place: Json) -> Json:
    defaults: Json = {
        "unit": panel.unit,
        "min": 0,
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
        "thresholds": {
            "mode": "absolute",
            "steps": [{"color": color, "value": value} for value, color in panel.thresholds],
        },
    }
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.kind == "timeseries":
        defaults["custom"] = _drawing(panel)
    return {
        "type": panel.kind,
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": [_target(query, index) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _STAT if panel.kind == "stat" else _LINES,
    }


def _drawing(panel: Panel) -> Json:
    has_limits = len(panel.thresholds) > 1 and not panel.stacked
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if panel.stacked else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if has_limits else "off"},
    }


_STAT: Json = {
    "colorMode": "value",
    "graphMode": "area",
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
}

_LINES: Json = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def _target(query: Query, index: int) -> Json:
    return {
        "refId": chr(ord("A") + index),
        "datasource": SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "range": True,
    }


def _variables() -> list[Json]:
    """Return the data source to read, and what to show of it."""
    source = {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"}
    labels = {"cluster": ("Cluster", "ray_cluster"), "namespace": ("Namespace", "namespace")}
    labels["deployment"] = ("Deployment", "deployment")
    return [source, *(_variable(name, *label) for name, label in labels.items())]


def _variable(name: str, title: str, label: str) -> Json:
    """Return a choice among a label's values; "all" also takes series that do not have the label."""
    query = f"label_values({EVERYWHERE}, {label})"
    return {
        "type": "query",
        "name": name,
        "label": title,
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _link() -> Json:
    """Return the menu of all our dashboards."""
    return {
        "type": "dashboards",
        "title": "Causal Forcing",
        "tags": ["causal-forcing"],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
    }
