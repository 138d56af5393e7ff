"""Containers: what opens, what is refused and why, and that nothing is ever executed."""

import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.weights.formats import open_checkpoint


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def tensors():
    return {"blocks.0.self_attn.q.weight": torch.arange(12.0).view(3, 4), "head.head.bias": torch.ones(5).bfloat16()}


def assert_holds(checkpoint, tensors):
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize("entry", [None, "generator", "generator_ema", "model", "state_dict", "generator_lora"])
@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_torch_files_of_every_layout_open(tmp_path, tensors, entry, prefix):
    stored = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    torch.save(stored if entry is None else {entry: stored, "step": 100}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert_holds(checkpoint, tensors)
    assert checkpoint.format == "torch"
    assert checkpoint.entry == entry
    assert checkpoint.prefixes == ((prefix,) if prefix else ())


def test_the_asked_for_entry_wins_and_ema_comes_first_otherwise(tmp_path, tensors):
    old = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"generator": old, "generator_ema": tensors, "critic": {}}, tmp_path / "x.pt")
    assert_holds(open_checkpoint(tmp_path / "x.pt"), tensors)
    assert_holds(open_checkpoint(tmp_path / "x.pt", entry="generator"), old)


def test_an_entry_that_has_to_be_there_is_not_replaced_by_another(tmp_path, tensors):
    torch.save({"generator": tensors, "step": 100}, tmp_path / "x.pt")
    assert_holds(open_checkpoint(tmp_path / "x.pt", entry="generator_ema"), tensors)
    assert_holds(open_checkpoint(tmp_path / "x.pt", entry="generator", any_entry=False), tensors)
    for entry in ("generator_ema", "step"):
        with pytest.raises(InvalidRequest, match=rf"entry: got '{entry}'; .*x\.pt has generator$"):
            open_checkpoint(tmp_path / "x.pt", entry=entry, any_entry=False)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "folder"])
def test_a_file_without_entries_says_so(tmp_path, tensors, name):
    if name == "x.pt":
        torch.save(tensors, tmp_path / name)
    elif name == "folder":
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "x.safetensors")
    else:
        save_file(tensors, tmp_path / name)
    assert_holds(open_checkpoint(tmp_path / name, entry="generator"), tensors)
    with pytest.raises(InvalidRequest, match=rf"entry: got 'generator'; .*{name} has no entries"):
        open_checkpoint(tmp_path / name, entry="generator", any_entry=False)


def test_tensors_of_a_torch_file_are_memory_mapped(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in Path("/proc/self/maps").read_text()
    checkpoint.read("a")[0] = 7  # private: the file does not change
    assert open_checkpoint(tmp_path / "x.pt").read("a")[0] == 0


def test_tensors_of_a_safetensors_file_are_memory_mapped(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "x.safetensors")
    tensor = open_checkpoint(tmp_path / "x.safetensors").read("a")
    assert str(tmp_path / "x.safetensors") in Path("/proc/self/maps").read_text()
    assert tensor.untyped_storage().nbytes() >= 4000


def test_safetensors_open_with_metadata(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors", metadata={"origin": "test"})
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert_holds(checkpoint, tensors)
    assert checkpoint.metadata["origin"] == "test"


def write_shards(folder, tensors, index="diffusion_pytorch_model.safetensors.index.json"):
    folder.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        shard = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor}, folder / shard)
        weight_map[name] = shard
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sharded_folder_opens(tmp_path, tensors):
    write_shards(tmp_path / "transformer", tensors)
    checkpoint = open_checkpoint(tmp_path / "transformer")
    assert_holds(checkpoint, tensors)
    assert checkpoint.format == "sharded safetensors"


def test_a_folder_with_one_file_opens(tmp_path, tensors):
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_a_missing_shard_is_named(tmp_path, tensors):
    write_shards(tmp_path / "m", tensors)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"1 of 2 shards are missing: model-00002-of-00002") as caught:
        open_checkpoint(tmp_path / "m")
    assert caught.value.reason == "CHECKPOINT_MISSING"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path, tensors, text):
    write_shards(tmp_path / "m", tensors)
    (tmp_path / "m" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(BadCheckpoint, match="not a shard index"):
        open_checkpoint(tmp_path / "m")


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path, tensors):
    write_shards(tmp_path / "m", tensors)
    index = tmp_path / "m" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(BadCheckpoint, match="'ghost'"):
        open_checkpoint(tmp_path / "m")


def test_a_folder_without_or_with_several_models_is_refused(tmp_path, tensors):
    with pytest.raises(BadCheckpoint, match="found nothing"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadCheckpoint, match=r"a\.safetensors, b\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadCheckpoint, match="no such file") as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert caught.value.reason == "CHECKPOINT_MISSING"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    path = tmp_path / name
    tensors = {"a": torch.zeros(5000)}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadCheckpoint) as caught:
        open_checkpoint(path)
    assert caught.value.reason == "CHECKPOINT_DAMAGED"
    assert name in caught.value.message


@pytest.mark.parametrize("part", ["pickle", "index"])
def test_a_wrong_bit_in_a_torch_files_structure_is_damage(tmp_path, tensors, part):
    torch.save({"generator": tensors}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    index = content.find(b"PK\x01\x02")
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        pickled = file.read("x/data.pkl")
    start = content.find(pickled)
    places = range(start, start + len(pickled)) if part == "pickle" else range(index, len(content))
    rng = random.Random(0)
    refused = 0
    for place in rng.sample(places, 150):
        wrong = bytearray(content)
        wrong[place] ^= 1 << rng.randrange(8)
        (tmp_path / "y.pt").write_bytes(wrong)
        try:
            open_checkpoint(tmp_path / "y.pt")
        except BadCheckpoint:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize(
    "content", [b"<html>404</html>", b"\0" * 4000, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_something_else_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint) as caught:
        open_checkpoint(tmp_path / name)
    assert caught.value.reason == "CHECKPOINT_DAMAGED"


def test_a_zip_that_is_not_torchs_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(BadCheckpoint) as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert caught.value.reason == "CHECKPOINT_DAMAGED"


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, kind):
    path, proof = tmp_path / "x.pt", tmp_path / "executed"
    content = {"model": {"a": torch.ones(2)}, "extra": Payload(proof)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(BadCheckpoint, match="could run code") as caught:
        open_checkpoint(path)
    assert caught.value.reason == "CHECKPOINT_UNSAFE"
    assert not proof.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"step": 3, "lr": 0.1}, {"generator": {"a": 1}}, torch.ones(3)])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match="named tensors"):
        open_checkpoint(tmp_path / "x.pt")


def test_two_names_that_are_one_without_prefixes_are_refused(tmp_path):
    torch.save({"model.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match=r"'model\.a' and 'a'"):
        open_checkpoint(tmp_path / "x.pt")


def fp8(seed=0):
    torch.manual_seed(seed)
    return torch.randn(4, 6).to(torch.float8_e4m3fn)


def test_unscaled_fp8_becomes_bfloat16_exactly(tmp_path):
    weight = fp8()
    save_file({"a.weight": weight, "norm.weight": torch.ones(3).bfloat16()}, tmp_path / "x.safetensors")
    read = open_checkpoint(tmp_path / "x.safetensors").read("a.weight")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.float(), weight.float())


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_per_tensor_is_multiplied_in(tmp_path, suffix, shape):
    weight = fp8()
    stored = {
        "a.weight": weight,
        f"a.{suffix}": torch.full(shape, 0.25),
        "a.scale_input": torch.ones(()),
        "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
        "spiece_model": torch.zeros(7, dtype=torch.uint8),
    }
    save_file(stored, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert set(checkpoint.tensors) == {"a.weight"}
    assert torch.equal(checkpoint.read("a.weight").float(), weight.float() * 0.25)


def test_an_fp8_weight_without_its_scale_is_refused(tmp_path):
    stored = {"a.weight": fp8(), "a.scale_weight": torch.ones(()), "b.weight": fp8(1)}
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match=r"1 fp8 weights have no scale: \['b\.weight'\]"):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "stored",
    [
        {"a.weight": fp8(), "a.scale_weight": torch.ones(4, 1)},
        {"a.weight": torch.ones(4, 6), "a.scale_weight": torch.ones(())},
        {"a.scale_weight": torch.ones(())},
    ],
    ids=["per-row", "not-fp8", "alone"],
)
def test_an_unknown_kind_of_scale_is_refused(tmp_path, stored):
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match="not one scale of an fp8 weight"):
        open_checkpoint(tmp_path / "x.safetensors")
