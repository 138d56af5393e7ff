"""Loading: every real format gives the same bits, and what does not fit exactly is refused with its cause."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.presets import CheckpointFile, PresetFiles, get_preset
from causal_forcing.text_encoder import fingerprint
from causal_forcing.weights import load_text_encoder, load_transformer, load_vae
from causal_forcing.weights.formats import TensorInfo
from causal_forcing.weights.locate import default_weights_dir, find_part
from causal_forcing.weights.writing import write_safetensors

FSDP = "model._fsdp_wrapped_module."


def save_sharded(folder, weights, index):
    """Write a Diffusers-format folder of two shards and a config."""
    folder.mkdir()
    names = list(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"x-0000{number}-of-00002.safetensors"
        save_file({name: weights[name].clone() for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"</s>": 1, "fox": 3, "<unk>": 2}, unk_token="<unk>")).save(
        str(folder / "tokenizer.json")
    )


def assert_same(module, weights):
    state = module.state_dict()
    assert set(state) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(state[name].float(), tensor.float()), name
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def prefixed(weights, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


TRANSFORMER_FILES = {
    "framewise .pt": lambda d, w, r: torch.save({"generator_ema": prefixed(w, FSDP)}, d / "transformer.pt"),
    "chunkwise .pt": lambda d, w, r: torch.save({"generator": prefixed(w, "model.")}, d / "transformer.pt"),
    "bare .pt": lambda d, w, r: torch.save(w, d / "transformer.pt"),
    "original safetensors": lambda d, w, r: save_file(w, d / "transformer.safetensors"),
    "ComfyUI safetensors": lambda d, w, r: save_file(
        prefixed(w, "model.diffusion_model."), d / "transformer.safetensors"
    ),
    "Diffusers folder": lambda d, w, r: save_sharded(
        d / "transformer", r(w, "transformer"), "diffusion_pytorch_model.safetensors.index.json"
    ),
}


@pytest.mark.parametrize("kind", TRANSFORMER_FILES)
def test_a_transformer_of_every_format_loads(tmp_path, preset, transformer_weights, rename, kind):
    TRANSFORMER_FILES[kind](tmp_path, transformer_weights, rename)
    assert_same(load_transformer(preset, tmp_path), transformer_weights)


@pytest.mark.parametrize("kind", ["original .pth", "original safetensors", "Diffusers folder"])
def test_a_vae_of_every_format_loads(tmp_path, preset, vae_weights, rename, kind):
    if kind == "original .pth":
        torch.save(vae_weights, tmp_path / "vae_wan.pth")
    elif kind == "original safetensors":
        save_file({k: t.contiguous() for k, t in vae_weights.items()}, tmp_path / "vae_wan.safetensors")
    else:
        (tmp_path / "vae").mkdir()
        save_file(rename(vae_weights, "vae"), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert_same(load_vae(preset, "wan", tmp_path), vae_weights)


def original(weights, rename):
    return rename(weights, "text_encoder")


def without_alias(weights, rename):
    return {name: tensor.clone() for name, tensor in weights.items() if name != "encoder.embed_tokens.weight"}


def without_shared(weights, rename):
    return {name: tensor.clone() for name, tensor in weights.items() if name != "shared.weight"}


def both(weights, rename):
    return {name: tensor.clone() for name, tensor in weights.items()}


@pytest.mark.parametrize("names", [original, without_alias, without_shared, both])
@pytest.mark.parametrize("kind", [".pth", ".safetensors", "folder"])
def test_a_text_encoder_of_every_format_loads(tmp_path, preset, text_encoder_weights, rename, names, kind):
    write_tokenizer(tmp_path)
    stored = names(text_encoder_weights, rename)
    if kind == ".pth":
        torch.save(stored, tmp_path / "text_encoder.pth")
    elif kind == ".safetensors":
        save_file(stored, tmp_path / "text_encoder.safetensors")
    else:
        save_sharded(tmp_path / "text_encoder", stored, "model.safetensors.index.json")
    encoder = load_text_encoder(preset, tmp_path)
    assert_same(encoder.encoder, text_encoder_weights)
    assert encoder.encoder.shared.weight is encoder.encoder.encoder.embed_tokens.weight
    assert encoder.encode(["fox"])[0].embeds.isfinite().all()


def test_an_fp8_text_encoder_loads_into_the_compute_dtype(tmp_path, preset, text_encoder_weights, rename):
    write_tokenizer(tmp_path)
    native = rename(text_encoder_weights, "text_encoder")
    stored = {
        name: tensor.to(torch.float8_e4m3fn if tensor.dim() == 2 and "embedding" not in name else torch.bfloat16)
        for name, tensor in native.items()
    }
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) == 2 * 7
    save_file(stored, tmp_path / "text_encoder.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        encoder = load_text_encoder(preset, tmp_path, dtype=dtype).encoder
        assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
        ours = encoder.encoder.block[0].layer[0].SelfAttention.q.weight
        assert torch.equal(ours.float(), stored["blocks.0.attn.q.weight"].float())


def test_two_different_embeddings_are_refused(tmp_path, preset, text_encoder_weights):
    write_tokenizer(tmp_path)
    stored = {name: tensor.clone() for name, tensor in text_encoder_weights.items()}
    stored["encoder.embed_tokens.weight"][0, 0] += 1
    save_file(stored, tmp_path / "text_encoder.safetensors")
    with pytest.raises(BadCheckpoint, match=r"shared\.weight and encoder\.embed_tokens\.weight differ"):
        load_text_encoder(preset, tmp_path)


def test_weights_of_the_right_dtype_stay_memory_mapped(tmp_path, preset, transformer_weights):
    save_file(transformer_weights, tmp_path / "transformer.safetensors")
    module = load_transformer(preset, tmp_path)
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("transformer.safetensors")
    ]
    assert all(any(low <= p.data_ptr() < high for low, high in ranges) for p in module.parameters())


def test_weights_are_converted(tmp_path, preset, transformer_weights):
    save_file(transformer_weights, tmp_path / "transformer.safetensors")
    module = load_transformer(preset, tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert_same(module, {name: tensor.bfloat16() for name, tensor in transformer_weights.items()})


def refuse(preset, folder, weights):
    torch.save({"generator": weights}, folder / "transformer.pt")
    with pytest.raises(BadCheckpoint) as caught:
        load_transformer(preset, folder)
    return caught.value


def test_a_missing_key_is_named(tmp_path, preset, transformer_weights):
    weights = {name: t for name, t in transformer_weights.items() if name != "blocks.1.ffn.2.bias"}
    error = refuse(preset, tmp_path, weights)
    assert "1 missing: blocks.1.ffn.2.bias; it is incomplete" in error.message
    assert error.reason == "CHECKPOINT_INCOMPLETE"


def test_many_missing_keys_are_counted(tmp_path, preset, transformer_weights):
    weights = {name: t for name, t in transformer_weights.items() if "blocks.1." not in name}
    error = refuse(preset, tmp_path, weights)
    assert "of 69 tensors expected and 42 found, 27 missing: " in error.message
    assert error.message.count("blocks.1.") == 3


def test_an_extra_key_is_named(tmp_path, preset, transformer_weights):
    weights = transformer_weights | {"blocks.0.cross_attn.k_img.weight": torch.ones(2)}
    error = refuse(preset, tmp_path, weights)
    assert "1 left over: blocks.0.cross_attn.k_img.weight; it is another variant of this model" in error.message
    assert error.reason == "CHECKPOINT_WRONG_MODEL"


def test_another_size_is_recognised(tmp_path, preset, transformer_weights):
    save_file(transformer_weights, tmp_path / "transformer.safetensors")
    larger = replace(preset, transformer=replace(preset.transformer, dim=64))
    with pytest.raises(
        BadCheckpoint, match=r"\[32, 16, 1, 2, 2\] instead of \[64, 16, 1, 2, 2\].*another size"
    ) as caught:
        load_transformer(larger, tmp_path)
    assert caught.value.reason == "CHECKPOINT_WRONG_SIZE"


def test_another_model_is_recognised(tmp_path, preset, vae_weights, text_encoder_weights, rename):
    error = refuse(preset, tmp_path, vae_weights)
    assert "holds a vae (original names), not a transformer" in error.message
    assert error.reason == "CHECKPOINT_WRONG_MODEL"
    save_file(rename(text_encoder_weights, "text_encoder"), tmp_path / "vae_wan.safetensors")
    with pytest.raises(BadCheckpoint, match=r"holds a text_encoder \(original names\), not a vae"):
        load_vae(preset, "wan", tmp_path)


def test_an_unknown_model_shows_some_of_its_names(tmp_path, preset):
    error = refuse(preset, tmp_path, {"transformer.h.0.attn.weight": torch.ones(1)})
    assert "holds no known model (it has transformer.h.0.attn.weight), not a transformer" in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, preset, transformer_weights, value):
    bad = transformer_weights["blocks.1.ffn.0.weight"].clone()
    bad[3, 4:6] = value
    error = refuse(preset, tmp_path, transformer_weights | {"blocks.1.ffn.0.weight": bad})
    assert "blocks.1.ffn.0.weight has 2 of 1536 values that are not finite in float32" in error.message
    assert error.reason == "CHECKPOINT_NON_FINITE"


def test_a_value_that_overflows_the_compute_dtype_is_refused(tmp_path, preset, transformer_weights):
    large = transformer_weights["head.head.bias"].clone()
    large[0] = 1e6
    save_file(transformer_weights | {"head.head.bias": large}, tmp_path / "transformer.safetensors")
    load_transformer(preset, tmp_path)
    with pytest.raises(BadCheckpoint, match="not finite in float16"):
        load_transformer(preset, tmp_path, dtype=torch.float16)


def test_missing_weights_name_the_command_and_the_places(tmp_path):
    preset = get_preset("causal-forcing-framewise")
    with pytest.raises(BadCheckpoint, match="causal-forcing download causal-forcing-framewise") as caught:
        load_transformer(preset, tmp_path)
    assert "zhuhz22/Causal-Forcing/framewise/causal_forcing.pt" in caught.value.message
    assert "transformer.safetensors" in caught.value.message
    assert caught.value.reason == "CHECKPOINT_MISSING"


def test_a_preset_without_files_does_not_advise_a_download(tmp_path):
    with pytest.raises(BadCheckpoint) as caught:
        load_transformer(get_preset("wan-14b"), tmp_path)
    assert "download" not in caught.value.message


def test_an_unknown_vae_is_an_invalid_request(tmp_path, preset):
    with pytest.raises(InvalidRequest) as caught:
        load_vae(preset, "tae", tmp_path)
    assert caught.value.metadata["field"] == "vae"


@pytest.mark.parametrize("place", ["owner/name/sub/x.pt", "name/sub/x.pt", "sub/x.pt", "owner/name/sub/x.safetensors"])
def test_a_file_is_found_in_each_of_its_places(tmp_path, preset, place):
    preset = replace(preset, files=PresetFiles(transformer=CheckpointFile("owner/name", "sub/x.pt")))
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).touch()
    assert find_part(preset, "transformer", tmp_path) == tmp_path / place


def test_a_converted_file_is_preferred(tmp_path, preset):
    for name in ("transformer.pt", "transformer.safetensors"):
        (tmp_path / name).touch()
    assert find_part(preset, "transformer", tmp_path).name == "transformer.safetensors"


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CAUSAL_FORCING_WEIGHTS", str(tmp_path))
    assert default_weights_dir() == tmp_path
    monkeypatch.delenv("CAUSAL_FORCING_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_weights_dir() == tmp_path / "causal-forcing"


def test_seeded_weights_are_the_same_bits_in_a_new_process():
    code = (
        "from dataclasses import replace as r;"
        "from causal_forcing.presets import get_preset as g; from causal_forcing.text_encoder import fingerprint as f;"
        "from causal_forcing.weights import load_transformer as t, load_vae as v; p = r(g('tiny'), trained=False);"
        "print(f(t(p)), f(v(p, 'lightvae')))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    preset = replace(get_preset("tiny"), trained=False)
    assert there == [fingerprint(load_transformer(preset)), fingerprint(load_vae(preset, "lightvae"))]


def test_seeded_parts_differ_from_each_other_and_between_presets():
    preset = replace(get_preset("tiny"), trained=False)
    one, other = load_transformer(preset), load_transformer(replace(preset, name="other"))
    assert not torch.equal(one.head.head.weight, other.head.head.weight)
    assert not torch.equal(one.blocks[0].self_attn.q.weight, one.blocks[1].self_attn.q.weight)
    assert one.blocks[0].norm3.weight.eq(1).all()


def test_untrained_weights_give_finite_colourful_video():
    from causal_forcing.engine import Engine
    from causal_forcing.prompts import PromptUpdate, WeightedPrompt

    session = Engine.load(replace(get_preset("tiny"), trained=False)).new_session()
    session.update_prompt(PromptUpdate((WeightedPrompt("a red fox"),)))
    pixels = torch.cat([session.decode(session.generate_chunk()) for _ in range(4)], dim=2)
    assert pixels.isfinite().all()
    assert pixels.std() > 0.1
    assert pixels.abs().eq(1).float().mean() < 0.5


def test_a_written_file_is_whole_or_absent(tmp_path):
    infos = {"a": TensorInfo((2, 3), torch.float32), "b": TensorInfo((), torch.bfloat16)}

    def produce(name):
        if name == "b":
            raise KeyboardInterrupt
        return torch.ones(2, 3)

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x.safetensors", infos, produce)
    assert list(tmp_path.iterdir()) == []


def test_an_announced_tensor_must_come_as_announced(tmp_path):
    with pytest.raises(ValueError, match="was announced as"):
        write_safetensors(tmp_path / "x", {"a": TensorInfo((2,), torch.float32)}, lambda name: torch.ones(3))
