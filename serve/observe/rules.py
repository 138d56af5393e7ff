"""The rules of k8s/monitoring/rules.yaml, for a Prometheus without Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).parents[2] / "k8s/monitoring"
"""In a checkout."""

RULES = MONITORING / "rules.yaml"


def groups() -> list[dict[str, Any]]:
    """Return the groups of rules."""
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["spec"]["groups"]
    return found


def write_groups(path: Path) -> None:
    """Write a file of rules as Prometheus reads it."""
    path.write_text(yaml.safe_dump({"groups": groups()}, sort_keys=False))


def expressions() -> dict[str, str]:
    """Return every rule's expression by what it records or the alert's name."""
    return {rule.get("record") or rule["alert"]: rule["expr"] for group in groups() for rule in group["rules"]}


def scraped_names() -> str:
    """Return the regular expression of the series' names that the pod monitor keeps."""
    monitor = yaml.safe_load((MONITORING / "pod-monitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (kept,) = [rule for rule in endpoint["metricRelabelings"] if rule["action"] == "keep"]
    names: str = kept["regex"]
    return names
