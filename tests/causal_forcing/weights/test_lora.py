"""LoRA: every naming style merges to the same weights, and nothing is skipped in silence."""

import re

import pytest
import torch
from safetensors.torch import save_file

from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.transformer import CausalTransformer
from causal_forcing.weights import LoraFile, load_transformer
from causal_forcing.weights.keys import TRANSFORMER_DIFFUSERS

RANK, ALPHA = 4, 8.0
MODULES = ("blocks.0.self_attn.q", "blocks.1.cross_attn.v", "blocks.1.ffn.0", "time_projection.1")


def to_diffusers(module):
    return TRANSFORMER_DIFFUSERS.to_file(f"{module}.weight").removesuffix(".weight")


PEFT = "base_model.model."
STYLES = {  # what precedes and follows the module's name for A, B and alpha, and how the name is spelt
    "PEFT": (PEFT, "lora_A.weight", "lora_B.weight", None, str),
    "PEFT, adapter named": (PEFT, "lora_A.default.weight", "lora_B.default.weight", None, str),
    "FSDP": (f"{PEFT}_fsdp_wrapped_module.", "lora_A.weight", "lora_B.weight", None, str),
    "bare": ("", "lora_A.weight", "lora_B.weight", None, str),
    "ComfyUI": ("diffusion_model.", "lora_down.weight", "lora_up.weight", "alpha", str),
    "Kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight", "alpha", lambda name: name.replace(".", "_")),
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight", None, to_diffusers),
}


@pytest.fixture(scope="module")
def factors(preset):
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in CausalTransformer(preset.transformer).state_dict().items()}
    torch.manual_seed(5)
    found = {}
    for module in MODULES:
        out, inner = shapes[f"{module}.weight"]
        found[module] = torch.randn(RANK, inner), torch.randn(out, RANK)
    return found


@pytest.fixture
def folder(tmp_path, transformer_weights):
    save_file(transformer_weights, tmp_path / "transformer.safetensors")
    return tmp_path


def name_tensors(factors, style):
    prefix, down, up, alpha, spell = STYLES[style]
    stored = {}
    for module, (a, b) in factors.items():
        name = prefix + spell(module)
        stored |= {f"{name}.{down}": a.clone(), f"{name}.{up}": b.clone()}
        if alpha:
            stored[f"{name}.{alpha}"] = torch.tensor(ALPHA)
    return stored, (ALPHA / RANK if alpha else 1.0)


def assert_merged(module, weights, factors, factor):
    state = module.state_dict()
    for name, weight in weights.items():
        pair = factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        expected = weight if pair is None else weight + factor * (pair[1] @ pair[0])
        torch.testing.assert_close(state[name], expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_every_naming_style_merges(folder, preset, transformer_weights, factors, style, scale):
    stored, ratio = name_tensors(factors, style)
    save_file(stored, folder / "l.safetensors")
    module = load_transformer(preset, folder, loras=[LoraFile(folder / "l.safetensors", scale)])
    assert_merged(module, transformer_weights, factors, scale * ratio)


def test_a_training_checkpoint_with_two_adapters_gives_the_generators(folder, preset, transformer_weights, factors):
    stored, _ = name_tensors(factors, "PEFT")
    other = {name: tensor + 1 for name, tensor in stored.items()}
    torch.save({"critic_lora": other, "generator_lora": stored}, folder / "lora.pt")
    module = load_transformer(preset, folder, loras=[LoraFile(folder / "lora.pt")])
    assert_merged(module, transformer_weights, factors, 1.0)


def test_what_peft_itself_writes_merges_to_what_peft_itself_computes(folder, preset, tmp_path):
    peft = pytest.importorskip("peft")
    base = load_transformer(preset, folder)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    lora = LoraFile(tmp_path / "adapter" / "adapter_model.safetensors", scale=ALPHA / RANK)  # the file has no alpha
    merged = load_transformer(preset, folder, loras=[lora]).state_dict()
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_several_add_up(folder, preset, transformer_weights, factors):
    stored, _ = name_tensors(factors, "bare")
    save_file(stored, folder / "l.safetensors")
    loras = [LoraFile(folder / "l.safetensors", 2.0), LoraFile(folder / "l.safetensors", -0.5)]
    assert_merged(load_transformer(preset, folder, loras=loras), transformer_weights, factors, 1.5)


def test_scale_zero_changes_nothing(folder, preset, transformer_weights, factors):
    save_file(name_tensors(factors, "bare")[0], folder / "l.safetensors")
    module = load_transformer(preset, folder, loras=[LoraFile(folder / "l.safetensors", 0.0)])
    assert_merged(module, transformer_weights, {}, 0.0)


def test_a_merge_is_rounded_once(folder, preset, transformer_weights, factors):
    save_file(name_tensors(factors, "bare")[0], folder / "l.safetensors")
    lora = [LoraFile(folder / "l.safetensors")]
    half = load_transformer(preset, folder, dtype=torch.bfloat16, loras=lora)
    whole = load_transformer(preset, folder, dtype=torch.float32, loras=lora)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.bfloat16())


def test_it_merges_into_a_convolution(folder, preset, transformer_weights):
    down, up = torch.randn(2, 16, 1, 2, 2), torch.randn(32, 2, 1, 1, 1)
    save_file(
        {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}, folder / "l.safetensors"
    )
    module = load_transformer(preset, folder, loras=[LoraFile(folder / "l.safetensors")])
    delta = (up.flatten(1) @ down.flatten(1)).view(32, 16, 1, 2, 2)
    torch.testing.assert_close(module.patch_embedding.weight, transformer_weights["patch_embedding.weight"] + delta)


def test_it_merges_into_seeded_weights_too(tmp_path):
    from causal_forcing.presets import get_preset

    preset = get_preset("tiny")
    dim = preset.transformer.dim
    a, b = torch.randn(2, dim), torch.randn(dim, 2)
    save_file(
        {"blocks.0.self_attn.q.lora_A.weight": a, "blocks.0.self_attn.q.lora_B.weight": b}, tmp_path / "l.safetensors"
    )
    plain, merged = load_transformer(preset), load_transformer(preset, loras=[LoraFile(tmp_path / "l.safetensors")])
    delta = merged.blocks[0].self_attn.q.weight - plain.blocks[0].self_attn.q.weight
    torch.testing.assert_close(delta, b @ a, atol=1e-5, rtol=1e-5)


def refuse(folder, preset, stored):
    save_file(stored, folder / "l.safetensors")
    with pytest.raises(BadCheckpoint) as caught:
        load_transformer(preset, folder, loras=[LoraFile(folder / "l.safetensors")])
    return caught.value.message


def test_a_key_that_fits_no_weight_is_named(folder, preset, factors):
    stored, _ = name_tensors(factors, "bare")
    message = refuse(folder, preset, stored | {"blocks.9.self_attn.q.lora_A.weight": torch.ones(4, 32)})
    assert "1 of 9 tensors fit no weight of this model: blocks.9.self_attn.q.lora_A.weight" in message


@pytest.mark.parametrize(
    "name", ["blocks.0.self_attn.q.diff", "blocks.0.norm3.lora_A.weight", "blocks.0.self_attn.q.dora_scale"]
)
def test_another_kind_of_adapter_is_refused(folder, preset, factors, name):
    assert name in refuse(folder, preset, name_tensors(factors, "bare")[0] | {name: torch.ones(32)})


def test_half_a_pair_is_refused(folder, preset, factors):
    stored, _ = name_tensors(factors, "bare")
    del stored["blocks.1.ffn.0.lora_B.weight"]
    assert "blocks.1.ffn.0 has no up half" in refuse(folder, preset, stored)
    stored["blocks.1.ffn.0.alpha"] = torch.tensor(ALPHA)
    del stored["blocks.1.ffn.0.lora_A.weight"]
    assert "blocks.1.ffn.0 has no down and no up half" in refuse(folder, preset, stored)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, 64), (32, 4)),
        ((4, 32), (64, 4)),
        ((4, 32), (32, 8)),
        ((0, 32), (32, 0)),
        ((32,), (32, 4)),
        ((4, 32), (32,)),
        ((), ()),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(folder, preset, a, b):
    stored = {"blocks.0.self_attn.q.lora_A.weight": torch.ones(a), "blocks.0.self_attn.q.lora_B.weight": torch.ones(b)}
    assert "does not give [32, 32]" in refuse(folder, preset, stored)


def test_a_checkpoint_that_is_no_lora_is_refused(folder, preset, transformer_weights):
    assert "fit no weight" in refuse(folder, preset, transformer_weights)
    assert "holds no LoRA tensors" in refuse(folder, preset, {"blocks.0.self_attn.q.alpha": torch.tensor(1.0)})


def test_a_lora_that_is_not_finite_is_refused(folder, preset, factors):
    stored, _ = name_tensors(factors, "bare")
    stored["blocks.0.self_attn.q.lora_A.weight"][0, 0] = float("nan")
    message = refuse(folder, preset, stored)
    assert "l.safetensors: blocks.0.self_attn.q.lora_A.weight has 1 of 128 values that are not finite" in message


def test_two_adapters_in_a_file_are_refused(folder, preset, factors):
    stored, _ = name_tensors(factors, "PEFT, adapter named")
    other = {name.replace(".default.", ".other."): tensor + 1 for name, tensor in stored.items()}
    message = refuse(folder, preset, stored | other)
    assert "lora_A.default.weight and base_model.model.blocks.0.self_attn.q.lora_A.other.weight update" in message
    assert "must hold one adapter" in message


@pytest.mark.parametrize("name", ["lora_B.bias", "lora_A.bias", "lora_B.default.bias"])
@pytest.mark.parametrize("module", ["blocks.0.self_attn.q", "blocks.0.self_attn.o"])
def test_a_bias_is_refused(folder, preset, factors, module, name):
    stored, _ = name_tensors(factors, "bare")
    assert f"{module}.{name}" in refuse(folder, preset, stored | {f"{module}.{name}": torch.ones(32)})


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.ones(2), r"q\.alpha is \[2\], must be one number"),
        (torch.ones(0), r"q\.alpha is \[0\], must be one number"),
        (torch.tensor(float("nan")), r"q\.alpha has 1 of 1 values that are not finite"),
        (torch.tensor([float("inf")]), r"q\.alpha has 1 of 1 values that are not finite"),
    ],
)
def test_an_alpha_is_one_finite_number(folder, preset, factors, alpha, message):
    stored, _ = name_tensors(factors, "ComfyUI")
    stored["diffusion_model.blocks.0.self_attn.q.alpha"] = alpha
    assert re.search(message, refuse(folder, preset, stored))


@pytest.mark.parametrize("scale", [10.5, -11.0, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_an_invalid_request(scale):
    with pytest.raises(InvalidRequest, match="-10 to 10"):
        LoraFile("x", scale)
