"""`convert` and `inspect` on real and broken weight files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from causal_forcing import cli

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a training checkpoint such as the real ones: wrapped names, two entries."""
    weights = {f"model.{name}": tensor for name, tensor in load_file(GOLDEN / "dit_weights.safetensors").items()}
    doubled = {name: 2 * tensor for name, tensor in weights.items()}
    torch.save({"generator": weights, "generator_ema": doubled}, tmp_path / "training.pt")
    return tmp_path / "training.pt"


def test_convert_writes_our_names_beside_the_source(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(checkpoint), "--entry", "generator"]) == 0
    written = checkpoint.with_suffix(".safetensors")
    assert f"wrote {written}: " in capsys.readouterr().out
    original, converted = load_file(GOLDEN / "dit_weights.safetensors"), load_file(written)
    assert original.keys() == converted.keys()
    assert all(torch.equal(original[name], converted[name]) for name in original)


def test_convert_takes_the_entry_and_dtype_asked_for(checkpoint: Path) -> None:
    target = checkpoint.with_name("half.safetensors")
    words = ["--entry", "generator_ema", "--dtype", "bfloat16", "--quiet"]
    assert cli.main(["convert", str(checkpoint), str(target), *words]) == 0
    original, converted = load_file(GOLDEN / "dit_weights.safetensors"), load_file(target)
    name = "blocks.0.self_attn.q.weight"
    assert torch.equal(converted[name], (2 * original[name]).to(torch.bfloat16))


def test_convert_does_not_overwrite_unasked(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = checkpoint.with_suffix(".safetensors")
    target.write_bytes(b"mine")
    assert cli.main(["convert", str(checkpoint), "--quiet"]) == 2
    assert target.read_bytes() == b"mine"
    assert "destination: got" in capsys.readouterr().err
    assert cli.main(["convert", str(checkpoint), "--quiet", "--overwrite"]) == 0
    assert load_file(target)


def test_inspect_says_what_a_file_holds(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(checkpoint), "--check-values"]) == 0
    shown = capsys.readouterr().out
    for part in ("transformer (original names)", "generator_ema", "dim=96", "96 float32", "loads       yes"):
        assert part in shown


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_an_entry_that_is_not_there_is_an_error(
    command: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, str(checkpoint), "--entry", "generator_emma"]) == 2
    assert f"entry: got 'generator_emma'; {checkpoint} has generator, generator_ema" in capsys.readouterr().err
    assert not checkpoint.with_suffix(".safetensors").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "not finite"])
def test_inspect_says_why_a_file_would_not_load(
    damage: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "missing":
        checkpoint.unlink()
    elif damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    else:
        weights = torch.load(checkpoint)["generator"]
        weights["model.head.head.bias"][0] = float("nan")
        torch.save(weights, checkpoint)
    assert cli.main(["inspect", str(checkpoint), "--check-values"]) == 1
    shown = capsys.readouterr().out
    assert "PROBLEM" in shown
    assert "loads       no" in shown


def test_parity_prints_its_table_and_fails_on_an_empty_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scheduler.safetensors").write_bytes((GOLDEN / "scheduler.safetensors").read_bytes())
    assert cli.main(["parity", str(tmp_path)]) == 0
    assert "0 failed" in capsys.readouterr().out
    (tmp_path / "scheduler.safetensors").unlink()
    assert cli.main(["parity", str(tmp_path)]) == 1
    assert "no golden files" in capsys.readouterr().out
