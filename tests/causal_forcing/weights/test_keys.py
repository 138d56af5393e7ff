"""Names: every manifest of a real checkpoint is covered exactly, and prefixes of training wrappers come off."""

import json
from pathlib import Path

import pytest
import torch

from causal_forcing.config import TextEncoderConfig, VaeConfig
from causal_forcing.presets import WAN_1_3B, WAN_14B
from causal_forcing.text_encoder import build_encoder
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import WanVae
from causal_forcing.weights.formats import Checkpoint, TensorInfo
from causal_forcing.weights.keys import (
    TEXT_ENCODER_ORIGINAL,
    TRANSFORMER_DIFFUSERS,
    Family,
    VaeDiffusersNaming,
    recognise,
    strip_prefixes,
    umt5_to_transformers,
)
from causal_forcing.weights.loading import match

MANIFESTS = Path(__file__).parents[2] / "manifests"
CASES = {
    "wan2.1_t2v_1.3b_original": (Family.TRANSFORMER, "original", lambda: CausalTransformer(WAN_1_3B), 825),
    "wan2.1_t2v_1.3b_diffusers": (Family.TRANSFORMER, "diffusers", lambda: CausalTransformer(WAN_1_3B), 825),
    "wan2.1_t2v_14b_original": (Family.TRANSFORMER, "original", lambda: CausalTransformer(WAN_14B), 1095),
    "wan2.1_vae_original": (Family.VAE, "original", lambda: WanVae(VaeConfig()), 194),
    "wan2.1_vae_diffusers": (Family.VAE, "diffusers", lambda: WanVae(VaeConfig()), 194),
    "lightvae_2.1_original_pruned75": (Family.VAE, "original", lambda: WanVae(VaeConfig(base_dim=24)), 194),
    "umt5_xxl_encoder_original": (Family.TEXT_ENCODER, "original", lambda: build_encoder(TextEncoderConfig()), 242),
    "umt5_xxl_encoder_transformers": (
        Family.TEXT_ENCODER,
        "transformers",
        lambda: build_encoder(TextEncoderConfig()),
        243,
    ),
}


def read_manifest(name):
    tensors = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: TensorInfo(tuple(shape), getattr(torch, dtype)) for key, (dtype, shape) in tensors.items()}


def as_checkpoint(infos):
    def read(name):
        return torch.zeros(1).expand(infos[name].shape)

    return Checkpoint(Path("manifest"), "manifest", None, (), infos, {}, read, {name: name for name in infos}, {})


def test_every_manifest_has_a_case():
    assert {path.stem for path in MANIFESTS.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_manifest_is_covered_exactly(name):
    family, style, build, count = CASES[name]
    infos = read_manifest(name)
    with torch.device("meta"):
        module = build()
    layout = recognise(infos)
    assert layout is not None
    assert (layout.family, layout.style) == (family, style)
    names = match(module, as_checkpoint(infos), family)
    used = set(names.values())
    if style == "transformers":
        used.add("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    assert used == set(infos)
    assert len(infos) == count
    assert {ours: tuple(t.shape) for ours, t in module.state_dict().items()} == {
        o: infos[n].shape for o, n in names.items()
    }


@pytest.mark.parametrize("name", ["wan2.1_t2v_1.3b_original", "wan2.1_t2v_14b_original"])
def test_parameter_counts_are_the_published_ones(name):
    total = sum(torch.Size(info.shape).numel() for info in read_manifest(name).values())
    assert total == {825: 1_418_996_800, 1095: 14_288_491_584}[len(read_manifest(name))]


@pytest.mark.parametrize(
    ("naming", "manifest"),
    [
        (TRANSFORMER_DIFFUSERS, "wan2.1_t2v_1.3b_original"),
        (VaeDiffusersNaming(), "wan2.1_vae_original"),
        (TEXT_ENCODER_ORIGINAL, "umt5_xxl_encoder_transformers"),
    ],
)
def test_renaming_there_and_back_is_the_identity(naming, manifest):
    names = [name for name in read_manifest(manifest) if name != "encoder.embed_tokens.weight"]
    assert [naming.to_ours(naming.to_file(name)) for name in names] == names
    assert len({naming.to_file(name) for name in names}) == len(names)


@pytest.mark.parametrize("naming", [TRANSFORMER_DIFFUSERS, TEXT_ENCODER_ORIGINAL, VaeDiffusersNaming()])
@pytest.mark.parametrize(
    "name", ["img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight", "x", "decoder.weird.weight"]
)
def test_a_name_of_another_model_is_not_guessed(naming, name):
    assert naming.to_file(name) is None
    assert naming.to_ours(name) is None


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "model._fsdp_wrapped_module.",
        "_fsdp_wrapped_module.model.",
        "module._orig_mod.",
        "model.diffusion_model.",
        "_orig_mod.model._checkpoint_wrapped_module.",
        "module.model._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.diffusion_model.",
    ],
)
def test_prefixes_come_off_in_any_order(prefix):
    assert strip_prefixes(f"{prefix}blocks.3.ffn.0.weight") == "blocks.3.ffn.0.weight"


def test_wrappers_inside_a_name_come_off():
    name = "model._fsdp_wrapped_module.blocks.3._checkpoint_wrapped_module.self_attn._orig_mod.q.weight"
    assert strip_prefixes(name) == "blocks.3.self_attn.q.weight"


def test_an_unknown_name_in_the_original_text_encoder_is_an_error():
    with pytest.raises(KeyError, match="lm_head"):
        umt5_to_transformers({"token_embedding.weight": torch.ones(1), "lm_head.weight": torch.ones(1)})
