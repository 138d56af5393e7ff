"""A preset at dimensions that fit in kilobytes, its modules with random weights, and the names of real files."""

from dataclasses import replace

import pytest
import torch

from causal_forcing.config import TextEncoderConfig, TransformerConfig, VaeConfig
from causal_forcing.presets import PresetFiles, get_preset
from causal_forcing.text_encoder import build_encoder
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import WanVae
from causal_forcing.weights.initialise import seeded_weights
from causal_forcing.weights.keys import (
    EMBEDDING_ALIAS,
    TEXT_ENCODER_ORIGINAL,
    TRANSFORMER_DIFFUSERS,
    VaeDiffusersNaming,
)


@pytest.fixture(scope="session")
def preset():
    """A model with files of its own, as ``wan-14b`` has."""
    text_encoder = TextEncoderConfig(
        vocab_size=64, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, num_buckets=8, text_len=16
    )
    return replace(
        get_preset("tiny"),
        name="small",
        transformer=TransformerConfig(
            dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=32, text_len=16
        ),
        text_encoder=text_encoder,
        vaes={"wan": VaeConfig(base_dim=4), "lightvae": VaeConfig(base_dim=2)},
        files=PresetFiles(),
        embedded=False,
        trained=True,
    )


@pytest.fixture(scope="session")
def transformer_weights(preset):
    with torch.device("meta"):
        return seeded_weights(CausalTransformer(preset.transformer), 1)


@pytest.fixture(scope="session")
def vae_weights(preset):
    with torch.device("meta"):
        return seeded_weights(WanVae(preset.vaes["wan"]), 2)


@pytest.fixture(scope="session")
def text_encoder_weights(preset):
    weights = seeded_weights(build_encoder(preset.text_encoder, "meta"), 3)
    return {**weights, EMBEDDING_ALIAS: weights["shared.weight"]}


@pytest.fixture(scope="session")
def rename():
    """Rename weights of one of our modules into another library's names."""
    namings = {
        "transformer": TRANSFORMER_DIFFUSERS,
        "vae": VaeDiffusersNaming(),
        "text_encoder": TEXT_ENCODER_ORIGINAL,
    }

    def apply(weights, family):
        renamed = {namings[family].to_file(name): tensor for name, tensor in weights.items() if name != EMBEDDING_ALIAS}
        assert None not in renamed
        return renamed

    return apply
