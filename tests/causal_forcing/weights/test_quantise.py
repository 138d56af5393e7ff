"""Quantisation: which layers, and a clear refusal where it cannot run."""

import sys
from types import ModuleType

import pytest
import torch

from causal_forcing.errors import InvalidRequest
from causal_forcing.presets import WAN_1_3B, get_preset
from causal_forcing.transformer import CausalTransformer
from causal_forcing.weights import load_transformer
from causal_forcing.weights.quantise import FP8, is_quantised, quantise, require_quantisation


def refusal(quantization, device):
    with pytest.raises(InvalidRequest) as caught:
        require_quantisation(quantization, device)
    assert caught.value.metadata["field"] == "quantization"
    return caught.value


def test_none_is_always_possible_and_changes_nothing():
    transformer = load_transformer(get_preset("tiny"))
    before = transformer.state_dict()
    quantise(transformer, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in transformer.state_dict().items())


def test_an_unknown_kind_names_the_known_one():
    assert FP8 in refusal("int4", "cuda").message


def test_a_cpu_is_refused():
    error = refusal(FP8, "cpu")
    assert "8.9" in error.message
    assert error.reason == "QUANTIZATION_UNAVAILABLE"


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "8.9" in refusal(FP8, "cuda").message


def test_a_missing_library_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'causal-forcing-serve[fp8]'" in refusal(FP8, "cuda").message


def test_the_blocks_linears_are_handed_to_the_library(monkeypatch):
    given = []
    library = ModuleType("torchao.quantization")
    library.Float8DynamicActivationFloat8WeightConfig = lambda granularity: ("dynamic", granularity)
    library.PerTensor = lambda: "per tensor"
    library.quantize_ = lambda module, config, filter_fn: given.append((module, config, filter_fn))
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", library)
    monkeypatch.setattr("causal_forcing.weights.quantise.require_quantisation", lambda quantization, device: None)
    transformer = load_transformer(get_preset("tiny"))
    quantise(transformer, FP8)
    assert given == [(transformer, ("dynamic", "per tensor"), is_quantised)]


def test_the_chosen_layers_are_nearly_all_of_the_arithmetic():
    with torch.device("meta"):
        transformer = CausalTransformer(WAN_1_3B)
    chosen = [name for name, module in transformer.named_modules() if is_quantised(module, name)]
    assert len(chosen) == 30 * 8
    share = sum(transformer.get_submodule(name).weight.numel() for name in chosen)
    assert share / sum(parameter.numel() for parameter in transformer.parameters()) > 0.88
    assert "blocks.0.cross_attn.k" not in chosen
    assert "head.head" not in chosen
