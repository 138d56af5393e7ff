"""The alert and recording rules: right in promtool's unit tests, and with an entry in the runbook each."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.metrics import ALL, Kind
from serve.observe.rules import RULES, expressions, write_groups

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "alerts.yaml"
RUNBOOK = ROOT / "docs/runbook.md"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")


def alerts() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(RULES.read_text())["spec"]["groups"]:
        yield from (rule for rule in group["rules"] if "alert" in rule)


@needs_promtool
def test_rules_do_in_promtool_what_their_cases_say(tmp_path: Path) -> None:
    write_groups(tmp_path / "rules.yaml")
    (tmp_path / CASES.name).write_text(CASES.read_text())
    done = subprocess.run(
        ["promtool", "test", "rules", CASES.name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_a_case_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    write_groups(tmp_path / "rules.yaml")
    (tmp_path / "wrong.yaml").write_text(
        "rule_files: [rules.yaml]\n"
        "tests:\n"
        "  - alert_rule_test: [{alertname: CausalForcingNoMetrics, eval_time: 10m, exp_alerts: []}]\n"
    )
    done = subprocess.run(
        ["promtool", "test", "rules", "wrong.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1


def test_every_alert_fires_in_a_case() -> None:
    fired = set(re.findall(r"CausalForcing[A-Za-z]+(?=\", alertstate=\"firing\", )", CASES.read_text()))
    fired |= {
        test["alertname"]
        for case in yaml.safe_load(CASES.read_text())["tests"]
        for test in case.get("alert_rule_test", ())
        if test["exp_alerts"]
    }
    assert {alert["alert"] for alert in alerts()} == fired


def test_every_alert_has_an_entry_in_the_runbook_and_every_entry_an_alert() -> None:
    entries = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    assert entries == [alert["alert"] for alert in alerts()]


@pytest.mark.parametrize("alert", list(alerts()), ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
    assert alert["annotations"]["summary"].endswith(".")
    assert alert["annotations"]["description"].endswith(".")


def test_links_in_the_runbook_lead_somewhere() -> None:
    text = RUNBOOK.read_text()
    anchors = {name.lower() for name in re.findall(r"^## (\w+)$", text, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= anchors


def series_names() -> set[str]:
    """Return the names that our metrics have on a node's port."""
    names = set()
    for metric in ALL.values():
        suffixes = ("_bucket", "_count", "_sum") if metric.kind is Kind.HISTOGRAM else ("",)
        names |= {f"ray_{metric.full_name}{suffix}" for suffix in suffixes}
    return names


@pytest.mark.parametrize("expression", expressions().values(), ids=expressions())
def test_rules_read_metrics_that_exist(expression: str) -> None:
    assert set(re.findall(r"ray_causal_forcing_\w+", expression)) <= series_names()
