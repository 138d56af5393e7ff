"""Where benchmarks write their results, and which of them the documents show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_a_rehearsal_of_the_gpu_check_leaves_the_record_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import _report
    import gpu_check

    monkeypatch.setattr(_report, "RESULTS", tmp_path / "results")
    words = ["--device", "cpu", "--preset", "tiny", "--size", "64x64", "--budget", "0"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words, "--partial", str(tmp_path / "partial.json")])
    assert gpu_check.main() == 0
    (written,) = (tmp_path / "results").iterdir()
    assert written.name == "gpu_check_tiny_64x64_cpu.json"
    assert json.loads(written.read_text())["readme"] == []


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (("cuda", "causal-forcing-framewise", "480x832"), "gpu_check"),
        (("cuda:1", "causal-forcing-framewise", "480x832"), "gpu_check"),
        (("cuda", "longlive", "480x832"), "gpu_check_longlive_480x832_cuda"),
        (("cpu", "causal-forcing-framewise", "480x832"), "gpu_check_causal-forcing-framewise_480x832_cpu"),
    ],
)
def test_only_a_gpu_with_the_default_model_makes_the_record(settings: tuple[str, str, str], name: str) -> None:
    import gpu_check

    assert gpu_check.result_name(*settings) == name


def test_headlines_are_in_both_tables_and_other_rows_in_one(tmp_path: Path) -> None:
    import readme

    rows: list[dict[str, Any]] = [
        {"measure": "speed", "value": "9", "headline": True},
        {"measure": "size", "value": "5"},
    ]
    result = {"commit": "abc", "hardware": {"cpus": 2, "machine": "x86_64"}, "readme": rows}
    (tmp_path / "one.json").write_text(json.dumps(result))
    (tmp_path / "none.json").write_text("{}")
    short = readme.render(tmp_path, headlines_only=True, folder="results")
    long = readme.render(tmp_path, headlines_only=False, folder="../results")
    assert short.splitlines()[2:] == ["| speed | 9 | [abc](results/one.json) | 2 cores, x86_64 |"]
    assert long.splitlines()[2:] == [
        "| speed | 9 | [abc](../results/one.json) | 2 cores, x86_64 |",
        "| size | 5 | [abc](../results/one.json) | 2 cores, x86_64 |",
    ]


def test_the_readme_has_the_few_numbers_that_a_newcomer_asks_for() -> None:
    import readme

    shown = readme.render(BENCHMARKS / "results", headlines_only=True, folder="benchmarks/results").splitlines()[2:]
    assert 5 <= len(shown) <= 10
