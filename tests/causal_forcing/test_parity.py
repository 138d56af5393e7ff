"""Parity with the golden tensors, and that every way of not comparing is a failure."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from causal_forcing.cli import main
from causal_forcing.parity import format_table, numerics_of, run_parity
from causal_forcing.transformer import TransformerBlock
from tests.causal_forcing.builders import embedding, make_transformer
from tests.causal_forcing.naive import NaiveStream, sigma_of

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(path.stem for path in GOLDEN.glob("*.safetensors") if path.stem != "dit_weights")
COMPARED = {
    "dit": {"first_flow", "first_x0", "latents", "kv_k_layer0", "kv_v_last", "warped_steps", "warped_first_steps"},
    "scheduler": {"sigmas", "timesteps", "warp_4", "warp_2", "warp_1"},
    "umt5": {"prompt_embeds", "raw"},
    "vae": {"pixels", "video_latent", "image_latent"},
}
INPUTS = {"noise", "renoise", "initial", "prompt0", "prompt1", "prompt2", "ids", "mask", "latent", "video"}


def read(name):
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def folder_with(folder, *names):
    for name in ("dit_weights", *names):
        shutil.copy(GOLDEN / f"{name}.safetensors", folder)
    return folder


def with_changed(folder, name, change):
    """Fill the folder with one golden run after ``change(tensors, config)``."""
    folder_with(folder)
    tensors, metadata = read(name)
    config = json.loads(metadata.get("config", "{}"))
    change(tensors, config)
    metadata = metadata | {"config": json.dumps(config)}
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / f"{name}.safetensors", metadata=metadata)
    return folder


def failures(folder):
    return [check for check in run_parity(folder) if not check.passed]


@pytest.fixture(scope="module")
def given():
    return run_parity(GOLDEN)


@pytest.mark.parametrize("name", FILES)
def test_every_given_golden_is_within_tolerance(given, name):
    checks = {check.name: check for check in given if check.file == name}
    assert checks.keys() == COMPARED[name.split("_")[0]]
    for check in checks.values():
        assert check.problem is None
        assert check.error <= check.tolerance


def test_tolerances_are_those_that_were_agreed(given):
    agreed = {"dit": 2e-5, "scheduler": 1e-5, "umt5": 1e-4, "vae": 1e-4}
    for check in given:
        assert check.tolerance <= agreed[check.file.split("_")[0]]


@pytest.mark.parametrize("name", ["dit_framewise_i2v", "dit_framewise_prompt_switch", "scheduler", "umt5_encoder"])
def test_every_stored_tensor_is_used_or_compared(given, name):
    tensors, _ = read(name)
    stored = {key for key in tensors if not key.startswith("weights.")}
    assert stored <= COMPARED[name.split("_")[0]] | INPUTS


def perturb(key):
    def change(tensors, _config):
        flat = tensors[key] = tensors[key].clone()
        flat.view(-1)[flat.numel() // 2] += 1e-3

    return change


@pytest.mark.parametrize("key", sorted(COMPARED["dit"]))
def test_one_perturbed_value_fails_that_comparison_only(tmp_path, key):
    failed = failures(with_changed(tmp_path, "dit_framewise_1step", perturb(key)))
    assert [check.name for check in failed] == [key]
    assert failed[0].error == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("key", ["noise", "prompt0", "renoise"])
def test_a_perturbed_input_shows_in_the_latents(tmp_path, key):
    assert "latents" in {check.name for check in failures(with_changed(tmp_path, "dit_framewise_2step", perturb(key)))}


@pytest.mark.parametrize(
    ("name", "key"), [("scheduler", "sigmas"), ("scheduler", "warp_2"), ("umt5_encoder", "prompt_embeds")]
)
def test_other_files_notice_a_perturbed_value_too(tmp_path, name, key):
    assert [check.name for check in failures(with_changed(tmp_path, name, perturb(key)))] == [key]


@pytest.mark.parametrize("key", ["pixels", "video_latent", "image_latent"])
def test_the_vae_notices_a_perturbed_value_too(tmp_path, key):
    assert [check.name for check in failures(with_changed(tmp_path, "vae_stream", perturb(key)))] == [key]


def test_nan_and_another_shape_fail(tmp_path):
    def change(tensors, _config):
        tensors["latents"][0, 1, 2, 3, 1] = float("nan")
        tensors["kv_v_last"] = tensors["kv_v_last"][:, :-1]

    failed = {check.name: check for check in failures(with_changed(tmp_path, "dit_framewise_1step", change))}
    assert failed.keys() == {"latents", "kv_v_last"}
    assert failed["latents"].error == float("inf")
    assert "shape" in failed["kv_v_last"].problem


def drop(key):
    def change(tensors, _config):
        del tensors[key]

    return change


def configure(**values):
    def change(_tensors, config):
        config.update(values)

    return change


@pytest.mark.parametrize(
    "change",
    [
        drop("latents"),
        drop("noise"),
        drop("prompt0"),
        drop("kv_k_layer0"),
        configure(num_layers=4),
        configure(dim=97),
        configure(num_frames=60),
        configure(steps=[250, 1000]),
        configure(latent_h=None),
        configure(local_attn_size=0),
    ],
    ids=range(10),
)
def test_a_run_that_cannot_be_executed_fails(tmp_path, change):
    failed = failures(with_changed(tmp_path, "dit_framewise_1step", change))
    assert len(failed) == 1
    assert failed[0].problem.startswith("not executed:")


def test_a_missing_config_fails(tmp_path):
    tensors, _ = read("dit_framewise_1step")
    save_file(tensors, folder_with(tmp_path) / "dit_framewise_1step.safetensors")
    assert failures(tmp_path)[0].problem.startswith("not executed:")


def test_runs_without_their_weights_fail(tmp_path):
    shutil.copy(GOLDEN / "dit_framewise_1step.safetensors", tmp_path)
    assert failures(tmp_path)[0].problem.startswith("not executed:")


def test_weights_of_another_model_fail(tmp_path):
    tensors, _ = read("dit_weights")
    tensors["blocks.0.self_attn.extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "dit_weights.safetensors")
    shutil.copy(GOLDEN / "dit_framewise_1step.safetensors", tmp_path)
    assert "extra" in failures(tmp_path)[0].problem


def test_a_folder_without_anything_to_compare_fails(tmp_path):
    assert not run_parity(tmp_path / "absent")[0].passed
    assert not run_parity(tmp_path)[0].passed
    (tmp_path / "README.md").write_text("text for people")
    assert not run_parity(tmp_path)[0].passed
    checks = run_parity(folder_with(tmp_path))
    assert [check.problem for check in checks] == ["weights, but no run to compare"]


@pytest.mark.parametrize("name", ["unknown.safetensors", "weights.bin", "dit_extra.pt", "runs"])
def test_a_file_that_is_not_known_fails_beside_runs_that_pass(tmp_path, name):
    folder_with(tmp_path, "scheduler")
    if name.endswith(".safetensors"):
        save_file({"something": torch.zeros(2)}, tmp_path / name)
    elif name == "runs":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"\x80\x04data")
    checks = run_parity(tmp_path)
    assert [check.file for check in checks if not check.passed] == [Path(name).stem]
    assert sum(check.passed for check in checks) == 5


def test_a_truncated_file_fails(tmp_path):
    path = folder_with(tmp_path, "scheduler") / "scheduler.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert failures(tmp_path)[0].problem.startswith("not executed:")


def test_another_size_of_model_runs_from_its_config_alone(tmp_path):
    """A golden made by the naive model, at dimensions that no given file has."""
    folder = naive_golden(tmp_path)
    checks = run_parity(folder)
    assert {check.name for check in checks} == COMPARED["dit"]
    assert all(check.passed for check in checks), format_table(checks)


def naive_golden(folder):
    config = {
        "text_len": 5, "text_dim": 12, "dim": 48, "ffn_dim": 64, "freq_dim": 16, "num_heads": 2, "num_layers": 2,
        "latent_h": 6, "latent_w": 4, "num_frame_per_block": 2, "local_attn_size": 5, "sink_size": 1,
        "cache_frames": 5, "num_frames": 12, "steps": [1000, 400], "first_steps": [1000, 700, 100],
    }  # fmt: skip
    transformer = make_transformer()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 12, 16, 6, 4, generator=generator)
    renoise = torch.randn(1, 12, 3, 16, 6, 4, generator=generator)

    def draw(chunk, number, _shape):
        frames = slice(2 * chunk, 2 * chunk + 2)
        return (noise[:, frames] if number == 0 else renoise[:, frames, number - 1]).transpose(1, 2)

    stream = NaiveStream(
        transformer,
        window=5,
        sink=1,
        relative=False,
        noise=draw,
        steps=config["steps"],
        first_steps=config["first_steps"],
    )
    embeds = embedding("a").embeds
    flow, _ = stream.forward(draw(0, 0, None), 1000.0, embeds)
    latents = torch.cat([stream.generate(chunk, None, embeds) for chunk in range(6)], dim=2)
    held = [0, 8, 9, 10, 11]

    def rows(layer, part):
        return torch.cat([part(stream.frames[p][layer], p) for p in held])[None].float()

    save_file({k: t.contiguous() for k, t in transformer.state_dict().items()}, folder / "dit_weights.safetensors")
    tensors = {
        "noise": noise,
        "renoise": renoise,
        "prompt0": embeds,
        "first_flow": flow.transpose(1, 2).float(),
        "first_x0": (draw(0, 0, None) - flow).transpose(1, 2).float(),
        "latents": latents.transpose(1, 2).float(),
        "kv_k_layer0": rows(0, lambda frame, position: stream.model.rope(frame[0], position, 4)),
        "kv_v_last": rows(1, lambda frame, _position: frame[1]),
        "warped_steps": torch.tensor([1000 * sigma_of(step) for step in config["steps"]]),
        "warped_first_steps": torch.tensor([1000 * sigma_of(step) for step in config["first_steps"]]),
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "dit_other.safetensors", metadata={"config": json.dumps(config)})
    return folder


def test_the_table_shows_every_comparison_and_counts_failures(given, tmp_path):
    table = format_table(given)
    assert table.splitlines()[-1] == f"{len(given)} comparisons, 0 failed"
    assert all(f"{check.file} {check.name}" in table for check in given)
    failed = run_parity(with_changed(tmp_path, "scheduler", perturb("sigmas")))
    assert "FAILED" in format_table(failed)
    assert format_table(failed).splitlines()[-1] == "5 comparisons, 1 failed"


def test_the_command_exits_with_1_unless_all_was_compared(tmp_path, capsys):
    assert main(["parity", str(folder_with(tmp_path, "scheduler"))]) == 0
    assert "5 comparisons, 0 failed" in capsys.readouterr().out
    (tmp_path / "unknown.bin").write_bytes(b"")
    assert main(["parity", str(tmp_path)]) == 1
    assert "6 comparisons, 1 failed" in capsys.readouterr().out
    assert main(["parity", str(tmp_path / "absent")]) == 1


def test_bfloat16_is_judged_by_relative_error():
    checks = run_parity(GOLDEN, numerics_of("cpu", torch.bfloat16))
    assert [c for c in checks if not c.passed] == []
    worst = max(c.error for c in checks)
    assert 1e-3 < worst < 0.1  # it was computed in bfloat16 indeed


@pytest.mark.slow
def test_a_wrong_layer_fails_in_bfloat16_too(monkeypatch):
    original = TransformerBlock._norm
    monkeypatch.setattr(TransformerBlock, "_norm", lambda self, x, shift, scale: original(self, x, shift, 1.1 * scale))
    checks = run_parity(GOLDEN, numerics_of("cpu", torch.bfloat16))
    assert any(not c.passed for c in checks if c.name == "latents")
