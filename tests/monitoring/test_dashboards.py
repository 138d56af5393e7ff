"""The dashboards: every panel says what it shows, is drawn of metrics that exist, and can be narrowed down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as model

from serve.metrics import ALL
from serve.metrics.dashboards import DASHBOARDS
from serve.metrics.dashboards.common import CHOSEN, RECORDED, WHERE
from serve.metrics.grafana import COLUMNS, Dashboard, Panel, Query, Row, render
from tests.monitoring.test_rules import series_names

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s/monitoring"
PANELS = {f"{board.title}: {panel.title}": panel for board in DASHBOARDS for panel in board.panels}
QUERIES = {f"{title} {index}": query for title, panel in PANELS.items() for index, query in enumerate(panel.queries)}
UNITS = {"s", "bytes", "Bps", "decmbytes", "percent", "percentunit", "cps", "short"}
"""Those of Grafana's units that are used; a wrong name would be shown as a suffix."""

every_board = pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.name)


@pytest.mark.parametrize("panel", PANELS.values(), ids=PANELS)
def test_a_panel_says_what_it_shows(panel: Panel) -> None:
    assert panel.unit in UNITS
    assert panel.description[0] == panel.description[0].upper()
    assert panel.description.endswith(".")
    assert panel.queries
    assert all(query.legend or panel.kind == "stat" for query in panel.queries)
    values = [value for value, _ in panel.thresholds]
    assert values[0] is None
    limits = [value for value in values[1:] if value is not None]
    assert len(limits) == len(values) - 1
    assert all(low < high for low, high in pairwise(limits))


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_an_expression_reads_what_there_is_of_what_was_chosen(query: Query) -> None:
    assert set(re.findall(r"ray_causal_forcing_\w+", query.expr)) <= series_names()
    selectors = re.findall(r"([\w:]+)\{([^}]*)\}", query.expr)
    assert selectors
    for name, labels in selectors:
        if name.startswith(("causal_forcing:", "ALERTS")):
            wanted = RECORDED
        elif name.startswith("ray_node_"):
            wanted = WHERE
        else:
            wanted = CHOSEN
        assert wanted in labels, name


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_labels_of_a_query_are_those_of_its_metrics(query: Query) -> None:
    for name, labels in re.findall(r"ray_causal_forcing_(\w+?)(?:_bucket|_count|_sum)?\{([^}]*)\}", query.expr):
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            assert value in ALL[name].labels[label]


@every_board
def test_panels_do_not_lie_on_each_other(board: Dashboard) -> None:
    taken = set()
    for panel in json.loads(render(board))["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < COLUMNS
        taken |= cells


@every_board
def test_a_dashboard_can_be_narrowed_down(board: Dashboard) -> None:
    document = json.loads(render(board))
    variables = {variable["name"]: variable for variable in document["templating"]["list"]}
    assert set(variables) == {"datasource", "cluster", "namespace", "deployment"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(document["panels"])))
    assert used - {"__rate_interval"} == set(variables)
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])


def left_out(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Yield what of a document is not in another one."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from left_out(value, kept.get(key, "nothing"), f"{path}/{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from left_out(one, other, f"{path}/{index}")
    elif given != kept:
        yield f"{path}: {given!r}"


@every_board
def test_grafanas_own_model_of_a_dashboard_knows_all_that_is_in_it(board: Dashboard) -> None:
    register_default_plugins()
    document = json.loads(render(board))
    understood = JSONEncoder(sort_keys=True).encode(model.Dashboard.from_json(document))
    assert list(left_out(document, json.loads(understood))) == []
    document["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    understood = JSONEncoder(sort_keys=True).encode(model.Dashboard.from_json(document))
    assert [path.split("/")[-1] for path in left_out(document, json.loads(understood))] == ["unitt: 's'"]


def test_the_manifests_hold_every_dashboard() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    files = {file for one in kustomization["configMapGenerator"] for file in one["files"]}
    assert files == {f"dashboards/{board.name}.json" for board in DASHBOARDS}
    assert {path.name for path in (FOLDER / "dashboards").iterdir()} == {f"{board.name}.json" for board in DASHBOARDS}
    assert kustomization["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}


def test_panels_that_the_runbook_names_exist() -> None:
    titles = {board.title: {panel.title for panel in board.panels} for board in DASHBOARDS}
    text = " ".join((ROOT / "docs/runbook.md").read_text().split())
    named = re.findall(r"\*([A-Z][^*]+)\*((?:,? (?:beside |and )?\"[^\"]+\")*)", text)
    assert len(named) > 10
    for board, panels in named:
        assert set(re.findall(r'"([^"]+)"', panels)) <= titles[board], board


def test_a_variable_that_no_panel_uses_would_be_noticed() -> None:
    panel = Panel("t", "D.", "s", (Query("up", "l"),))
    document: Any = json.loads(render(Dashboard("n", "t", "d", (Row("r", (panel,)),))))
    assert "$cluster" not in json.dumps(document["panels"])
