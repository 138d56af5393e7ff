"""`causal-forcing doctor`: what it says of this machine, and of weights that are not there."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config

from causal_forcing.arithmetic import pass_flops
from causal_forcing.cli import main
from causal_forcing.commands import doctor
from causal_forcing.errors import OutOfMemory
from causal_forcing.presets import PRESETS, WAN_1_3B
from causal_forcing.startup import StartUp
from causal_forcing.weights.memory import require_memory, required_bytes


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch):
    monkeypatch.setattr(doctor, "matmul_flops_per_s", lambda _device: 1e15)
    monkeypatch.setattr(doctor, "cold_start", lambda _device, startup: {**startup.phases, "load": 0.5})


def examined(capsys, tmp_path):
    assert main(["doctor", "--device", "cpu", "--json", "--weights-dir", str(tmp_path)]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_preset_is_judged(capsys, tmp_path):
    found = examined(capsys, tmp_path)
    presets = {preset["name"]: preset for preset in found["presets"]}
    assert list(presets) == list(PRESETS)
    assert presets["tiny"]["fits"]
    assert presets["tiny"]["missing"] == []
    real = presets["causal-forcing-framewise"]
    assert real["missing"] == ["transformer", "text_encoder", "tokenizer", "vae/wan"]
    assert real["fix"] == "causal-forcing download causal-forcing-framewise"
    assert "lora" in presets["longlive"]["missing"]
    assert found["free_disk_bytes"] > 0


def test_what_lies_there_is_not_missing(capsys, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    presets = {preset["name"]: preset for preset in examined(capsys, tmp_path)["presets"]}
    assert "tokenizer" not in presets["causal-forcing-framewise"]["missing"]


def test_a_model_that_needs_more_than_there_is_does_not_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda _device: 10**9)
    presets = {preset["name"]: preset for preset in examined(capsys, tmp_path)["presets"]}
    assert not presets["wan-14b"]["fits"]
    assert presets["tiny"]["fits"]


def test_what_fits_is_what_would_be_loaded(capsys, tmp_path, monkeypatch):
    plan = required_bytes(PRESETS["tiny"], "wan", PRESETS["tiny"].session_config(), torch.float32)
    for free, fits in ((plan.needed_bytes, True), (plan.needed_bytes - 1, False)):
        monkeypatch.setattr(doctor, "free_bytes", lambda _device, free=free: free)
        (tiny,) = (p for p in doctor.examine(torch.device("cpu"), tmp_path)["presets"] if p["name"] == "tiny")
        assert (tiny["fits"], tiny["needs_bytes"]) == (fits, plan.needed_bytes)
        with nullcontext() if fits else pytest.raises(OutOfMemory):
            require_memory(plan, "cpu", free=doctor.free_bytes)


def test_people_read_the_command_that_fixes_it_and_what_a_start_takes(capsys, tmp_path):
    assert main(["doctor", "--device", "cpu", "--weights-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "causal-forcing download longlive" in shown
    assert re.search(r"cold: [\d.]+ s \(import [\d.]+, load 0\.50\)", shown)


def test_a_cold_start_is_measured_with_the_embedded_model(monkeypatch):
    monkeypatch.undo()
    phases = doctor.cold_start(torch.device("cpu"), StartUp(phases={"import": 1.0}))
    assert list(phases) == ["import", "load", "first chunk"]
    assert min(phases.values()) > 0


def test_the_driver_is_named_where_there_is_one(monkeypatch):
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_a, **_o: SimpleNamespace(stdout="580.159.04\n580.159.04\n"))
    assert doctor.driver_version() == "580.159.04"


def test_a_compiler_that_is_missing_is_named(capsys, tmp_path):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert main(["doctor", "--device", "cpu", "--weights-dir", str(tmp_path)]) == 0
    assert "compiled  needs a C++ compiler" in capsys.readouterr().out


def test_no_driver_is_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.driver_version() is None


def test_frames_a_second_follow_from_the_arithmetic(tmp_path):
    found = doctor.examine(torch.device("cpu"), tmp_path)
    framewise = next(p for p in found["presets"] if p["name"] == "causal-forcing-framewise")
    # model_spec section 9: 13.469 TFLOP a pass, five passes a chunk of four frames
    assert pass_flops(WAN_1_3B, 1560, 32760) == pytest.approx(13.469e12, rel=0.01)
    assert framewise["decode_tflop"] == pytest.approx(13.55, rel=0.05)  # the reference's; ours leaves padding out
    whole = framewise["chunk_tflop"] + framewise["decode_tflop"]
    assert framewise["fps_decoded_at_most"] == pytest.approx(4 * 1e3 / whole, rel=0.01)
    assert framewise["fps_at_most"] == pytest.approx(4 * 1e15 / (5 * 13.469e12), rel=0.01)
