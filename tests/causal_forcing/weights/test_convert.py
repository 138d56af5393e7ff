"""Conversion and inspection: every format becomes the same safetensors file, and a file says what it is."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from causal_forcing.config import TinyVaeConfig
from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.presets import get_preset
from causal_forcing.vae import TinyVae
from causal_forcing.weights import load_transformer
from causal_forcing.weights.convert import convert
from causal_forcing.weights.initialise import seeded_weights
from causal_forcing.weights.inspection import inspect_file
from causal_forcing.weights.locate import find_part


def contiguous(weights):
    return {name: tensor.contiguous() for name, tensor in weights.items()}


@pytest.fixture
def framewise(tmp_path, transformer_weights):
    """A file laid out as Causal Forcing's frame-wise checkpoints are."""
    path = tmp_path / "transformer.pt"
    torch.save({"generator_ema": {f"model._fsdp_wrapped_module.{n}": t for n, t in transformer_weights.items()}}, path)
    return path


def test_a_training_checkpoint_becomes_safetensors_under_our_names(framewise, transformer_weights):
    seen = []
    path = convert(framewise, on_progress=lambda done, total: seen.append((done, total)))
    assert path == framewise.with_suffix(".safetensors")
    stored = load_file(path)
    assert set(stored) == set(transformer_weights)
    assert all(torch.equal(stored[name], tensor) for name, tensor in transformer_weights.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "model": "transformer",
            "converted_from": "transformer.pt",
            "entry": "generator_ema",
        }
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in transformer_weights.values())


def test_the_converted_file_is_what_loads_next(framewise, preset, transformer_weights):
    convert(framewise, dtype=torch.bfloat16)
    assert find_part(preset, "transformer", framewise.parent).suffix == ".safetensors"
    module = load_transformer(preset, framewise.parent)
    expected = transformer_weights["head.head.weight"].bfloat16().float()
    assert torch.equal(module.head.head.weight, expected)


def test_a_diffusers_folder_becomes_a_file_beside_it(tmp_path, preset, vae_weights, rename):
    (tmp_path / "vae").mkdir()
    save_file(contiguous(rename(vae_weights, "vae")), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    path = convert(tmp_path / "vae")
    assert path == tmp_path / "vae.safetensors"
    stored = load_file(path)
    assert all(torch.equal(stored[name], tensor) for name, tensor in vae_weights.items())


def test_the_shared_embedding_is_written_once(tmp_path, text_encoder_weights, rename):
    native, both = tmp_path / "native.pth", tmp_path / "both.pth"
    torch.save(rename(text_encoder_weights, "text_encoder"), native)
    torch.save(text_encoder_weights, both)
    for source in (native, both):
        stored = load_file(convert(source))
        assert set(stored) == set(text_encoder_weights) - {"encoder.embed_tokens.weight"}
        assert all(torch.equal(stored[name], text_encoder_weights[name]) for name in stored)


def test_fp8_becomes_bfloat16(tmp_path, text_encoder_weights, rename):
    native = rename(text_encoder_weights, "text_encoder")
    native["blocks.0.attn.q.weight"] = native["blocks.0.attn.q.weight"].to(torch.float8_e4m3fn)
    save_file(native, tmp_path / "fp8.safetensors")
    stored = load_file(convert(tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"))
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert stored[name].dtype == torch.bfloat16
    assert torch.equal(stored[name].float(), native["blocks.0.attn.q.weight"].float())
    assert {tensor.dtype for key, tensor in stored.items() if key != name} == {torch.float32}


def test_an_existing_destination_is_kept_unless_overwriting_is_asked_for(framewise):
    path = framewise.with_suffix(".safetensors")
    path.write_text("mine")
    with pytest.raises(InvalidRequest) as caught:
        convert(framewise)
    assert caught.value.metadata["field"] == "destination"
    assert path.read_text() == "mine"
    convert(framewise, overwrite=True)
    assert inspect_file(path).problems == ()


def test_a_destination_of_another_kind_is_refused(framewise, tmp_path):
    with pytest.raises(InvalidRequest, match=r"must end in \.safetensors"):
        convert(framewise, tmp_path / "out.pt")


def test_a_full_disk_is_refused_before_writing(framewise, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InvalidRequest, match="must have 0.00 GB free") as caught:
        convert(framewise)
    assert caught.value.reason == "DISK_FULL"
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_value_that_is_not_finite_leaves_nothing_behind(tmp_path, transformer_weights):
    bad = transformer_weights | {"head.head.bias": torch.full((64,), float("nan"))}
    torch.save(bad, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match=r"head\.head\.bias has 64 of 64 values"):
        convert(tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("stored", [{"a": torch.ones(1)}, {"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 32)}])
def test_what_is_no_model_is_not_converted(tmp_path, stored):
    torch.save(stored, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match="holds (no model|a LoRA)"):
        convert(tmp_path / "x.pt")


def test_an_incomplete_model_is_not_converted(tmp_path, transformer_weights):
    torch.save({n: t for n, t in transformer_weights.items() if n != "head.head.bias"}, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match=r"1 missing: head\.head\.bias"):
        convert(tmp_path / "x.pt")


def test_inspection_describes_a_training_checkpoint(framewise, transformer_weights, preset):
    found = inspect_file(framewise, check_values=True)
    assert (found.format, found.family, found.style) == ("torch", "transformer", "original")
    assert found.entry == "generator_ema"
    assert found.prefixes == ("model._fsdp_wrapped_module.",)
    assert found.tensor_count == len(transformer_weights)
    assert found.parameter_count == sum(tensor.numel() for tensor in transformer_weights.values())
    assert found.size_bytes == 4 * found.parameter_count
    assert found.dtypes == {"float32": len(transformer_weights)}
    assert found.config.num_layers == preset.transformer.num_layers
    assert found.problems == ()


@pytest.mark.parametrize(
    ("name", "part", "family"),
    [
        ("tiny", "transformer", "transformer"),
        ("tiny", "vae/wan", "vae"),
        ("causal-forcing-framewise", "vae/tae", "tiny_vae"),
    ],
)
def test_inspection_finds_the_presets_whose_sizes_fit(tmp_path, name, part, family):
    from causal_forcing.transformer import CausalTransformer
    from causal_forcing.weights.loading import build_vae

    preset = get_preset(name)
    with torch.device("meta"):
        module = CausalTransformer(preset.transformer)
    if part != "transformer":
        module, _ = build_vae(preset.vaes[part.removeprefix("vae/")])
    save_file(contiguous(seeded_weights(module, 0)), tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors")
    assert found.family == family
    assert found.problems == ()
    assert name in found.presets


def test_inspection_knows_a_text_encoder_in_every_naming(tmp_path, text_encoder_weights, rename):
    torch.save(rename(text_encoder_weights, "text_encoder"), tmp_path / "a.pth")
    torch.save(text_encoder_weights, tmp_path / "b.pth")
    original, ours = inspect_file(tmp_path / "a.pth"), inspect_file(tmp_path / "b.pth")
    assert (original.style, ours.style) == ("original", "transformers")
    assert original.config == ours.config
    assert original.problems == ours.problems == ()


def test_inspection_reports_problems_instead_of_raising(tmp_path, transformer_weights):
    bad = transformer_weights | {"head.head.bias": torch.full((64,), float("inf")), "head.extra": torch.ones(1)}
    torch.save(bad, tmp_path / "bad.pt")
    found = inspect_file(tmp_path / "bad.pt", check_values=True)
    assert "1 left over: head.extra" in found.problems[0]
    assert "head.head.bias has 64 of 64 values that are not finite" in found.problems[1]
    (tmp_path / "cut.pt").write_bytes((tmp_path / "bad.pt").read_bytes()[:1000])
    assert inspect_file(tmp_path / "cut.pt").format is None
    assert "truncated" in inspect_file(tmp_path / "cut.pt").problems[0]
    assert "no such file" in inspect_file(tmp_path / "absent.pt").problems[0]
    torch.save({"h.0.attn.weight": torch.ones(1)}, tmp_path / "gpt.pt")
    assert "first tensors are h.0.attn.weight" in inspect_file(tmp_path / "gpt.pt").problems[0]


def test_inspection_of_a_fragment_says_that_sizes_are_missing(tmp_path):
    torch.save({"blocks.0.self_attn.q.weight": torch.ones(4, 4)}, tmp_path / "x.pt")
    assert "lacks the tensors that show its sizes" in inspect_file(tmp_path / "x.pt").problems[0]


def test_inspection_recognises_a_lora(tmp_path):
    torch.save({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 32)}, tmp_path / "x.pt")
    found = inspect_file(tmp_path / "x.pt")
    assert (found.family, found.problems) == ("lora", ())


def test_the_public_tiny_autoencoder_has_64_decoder_tensors():
    """Read from the header of the public taew2_1 file by others: 64 tensors, and these shapes."""
    with torch.device("meta"):
        state = TinyVae(TinyVaeConfig()).state_dict()
    decoder = {name: tuple(t.shape) for name, t in state.items() if name.startswith("decoder.")}
    assert len(decoder) == 64
    assert decoder["decoder.1.weight"] == (256, 16, 3, 3)
    assert decoder["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert decoder["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert decoder["decoder.22.weight"] == (3, 64, 3, 3)
