"""`download` announces sizes and licences, verifies what is there, and says what is missing; without a network here."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from causal_forcing import cli
from causal_forcing.presets import PRESETS, CheckpointFile, PresetFiles
from causal_forcing.weights.locate import download_path

DATA = b"weights" * 100
FILE = CheckpointFile("owner/name", "model.safetensors", "0" * 40, len(DATA), hashlib.sha256(DATA).hexdigest(), "MIT")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the only file of a preset."""
    preset = replace(PRESETS["wan-14b"], files=PresetFiles(transformer=FILE))
    monkeypatch.setattr("causal_forcing.commands.download.get_preset", lambda _name: preset)
    path = download_path(FILE, tmp_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DATA)
    return tmp_path


def test_what_is_there_is_verified(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "wan-14b", "--weights-dir", str(weights), "--offline"]) == 0
    shown = capsys.readouterr()
    assert "transformer: owner/name/model.safetensors (0.00 GB, MIT), there" in shown.out
    assert f"1 files verified in {weights}" in shown.out
    assert "verify transformer" in shown.err


def test_a_dry_run_stops_after_the_announcement(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download_path(FILE, weights).write_bytes(b"x" * len(DATA))
    assert cli.main(["download", "wan-14b", "--weights-dir", str(weights), "--offline", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "0.00 GB to fetch" in shown
    assert "verified" not in shown


def test_a_damaged_file_is_an_error(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download_path(FILE, weights).write_bytes(b"x" * len(DATA))
    assert cli.main(["download", "wan-14b", "--weights-dir", str(weights), "--offline", "--quiet"]) == 1
    assert "CHECKPOINT_DAMAGED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("tiny", 2, "preset: got 'tiny'; ships with this package"),
        ("huge", 2, "preset: got 'huge'; must be one of"),
        ("causal-forcing-framewise --part engine", 2, "parts: got ['engine']; preset causal-forcing-framewise has"),
        ("causal-forcing-framewise --offline", 1, "is not there, and the network is off limits (CHECKPOINT_MISSING)"),
        ("longlive --offline", 2, "has no commit or hash known to this program"),
        (f"longlive --revision typo/repo={'0' * 40}", 2, "revisions: got ['typo/repo']; the files come from "),
        ("longlive --revision main", 2, "revision: got 'main'; must be REPO=COMMIT"),
    ],
)
def test_errors(words: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", *words.split(), "--weights-dir", str(tmp_path)]) == status
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
