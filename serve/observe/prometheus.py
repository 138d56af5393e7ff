"""A Prometheus of our own, for as long as a block runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from causal_forcing.errors import InvalidRequest
from serve.errors import Unavailable
from serve.local import require_free_port

from .rules import scraped_names, write_groups

START_S = 60.0
"""Patience with a Prometheus that starts on a busy machine."""

LABELS = {"namespace": "local", "ray_cluster": "local"}
"""What Kubernetes would say about a pod."""


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus.

    Attributes:
        url: Of its pages and its API.
    """

    url: str

    def query(self, expr: str) -> list[Any]:
        """Return what an expression evaluates to now: samples with ``metric`` and ``value``.

        Raises:
            InvalidRequest: If it is not PromQL, or cannot be evaluated.
        """
        asked = urllib.parse.urlencode({"query": expr})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{asked}", timeout=30) as answer:
                result: list[Any] = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise InvalidRequest("query", expr, json.load(error)["error"]) from None
        return result

    def rules(self) -> dict[str, str]:
        """Return each rule's health by its name: ``ok``, ``err`` or ``unknown`` before the first evaluation."""
        with urllib.request.urlopen(f"{self.url}/api/v1/rules", timeout=30) as answer:
            groups = json.load(answer)["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}


@contextmanager
def prometheus(
    targets: Mapping[str, str], folder: Path, *, port: int, interval_s: int, lan: bool = False
) -> Iterator[Prometheus]:
    """Run Prometheus with the project's rules; it keeps its data in the folder.

    Args:
        targets: ``host:port`` to scrape, by the job's name.
        folder: For its configuration and data; made if it is not there.
        port: Of its pages and its API.
        interval_s: Between two scrapes, and two evaluations of rules.
        lan: Whether other machines (a Grafana) may ask it.

    Raises:
        InvalidRequest: If it is not installed, or the port is taken (field ``port``).
        Unavailable: If it does not start.
    """
    if shutil.which("prometheus") is None:
        raise InvalidRequest("prometheus", None, "must be installed, e.g. apt-get install prometheus")
    require_free_port("port", port)
    folder.mkdir(parents=True, exist_ok=True)
    write_groups(folder / "rules.yaml")
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(_configuration(targets, interval_s)))
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={'0.0.0.0' if lan else '127.0.0.1'}:{port}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield _ready(Prometheus(f"http://127.0.0.1:{port}"), process, folder)
        finally:
            process.terminate()
            process.wait()


def _configuration(targets: Mapping[str, str], interval_s: int) -> dict[str, Any]:
    """Return what Prometheus reads; of the series it keeps what the pod monitor keeps, and those of clients."""
    kept = f"({scraped_names()}|causal_forcing_.*)"
    return {
        "global": {"scrape_interval": f"{interval_s}s", "evaluation_interval": f"{interval_s}s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [{"targets": [target], "labels": LABELS}],
                "metric_relabel_configs": [{"source_labels": ["__name__"], "regex": kept, "action": "keep"}],
            }
            for job, target in targets.items()
        ],
    }


def _ready(started: Prometheus, process: subprocess.Popen[bytes], folder: Path) -> Prometheus:
    deadline_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{started.url}/-/ready", timeout=5):
            return started
        time.sleep(0.1)
    last = (folder / "prometheus.log").read_text().splitlines()[-1:]
    raise Unavailable(f"Prometheus did not start: {' '.join(last)}", reason="PROMETHEUS_NOT_STARTED")
