"""Memory: the arithmetic is what is really allocated, and too small a device is refused."""

import re
from pathlib import Path

import pytest
import torch

from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest, OutOfMemory
from causal_forcing.presets import PRESETS, get_preset
from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from causal_forcing.text_encoder import DEFAULT_CACHE_BYTES
from causal_forcing.weights.memory import (
    ACTIVATIONS,
    PROMPT_CACHE,
    RESERVE_BYTES,
    _cgroup_free,
    free_bytes,
    require_memory,
    required_bytes,
)

DOCUMENT = Path(__file__).parents[3] / "docs" / "weights.md"


def items(plan):
    return {what.removeprefix("1 x "): size for what, size in plan.items}


def test_the_published_sizes_come_out():
    preset = get_preset("causal-forcing-framewise")
    plan = items(required_bytes(preset, "wan", preset.session_config(), torch.bfloat16))
    assert plan["generator weights"] == 2 * 1_418_996_800
    assert plan["text encoder weights"] == pytest.approx(11.36e9, rel=1e-3)
    assert plan["VAE weights (wan)"] == pytest.approx(0.254e9, rel=1e-2)
    assert plan["keys and values of 21 frames"] == 2 * 30 * 21 * 1560 * 1536 * 2  # 6.04 GB
    assert plan["prompt keys and values"] == pytest.approx(0.094e9, rel=1e-2)
    assert plan["decoder state"] == pytest.approx(1.889e9, rel=1e-3)


def test_the_arithmetic_is_what_a_session_really_holds():
    engine = Engine.load("tiny", vae="lightvae")
    config = engine.session_config(window_frames=5, sink_frames=2)
    plan = items(required_bytes(engine.preset, "lightvae", config, torch.float32))
    session = engine.new_session(config)
    session.update_prompt(PromptUpdate((WeightedPrompt("a fox"),)))
    session.generate_chunk()
    parts = session.state.nbytes_by_part()
    assert plan["keys and values of 5 frames"] == parts["self_attention"]
    assert plan["prompt keys and values"] == parts["cross_attention"]
    assert plan["decoder state"] == parts["decoder"]
    assert plan["generator weights"] == sum(p.nbytes for p in engine.transformer.parameters())
    assert plan["VAE weights (lightvae)"] == sum(p.nbytes for p in engine.vae.parameters())
    assert plan["text encoder weights"] == sum(p.nbytes for p in engine.text_encoder.encoder.parameters())


def test_what_is_elsewhere_is_not_counted():
    preset = get_preset("tiny")
    config = preset.session_config()
    whole = required_bytes(preset, "wan", config, torch.float32)
    generator = items(required_bytes(preset, None, config, torch.float32, text_encoder=False))
    assert set(generator) - set(items(whole)) == {ACTIVATIONS}
    assert generator["decoder state"] == 0
    assert "text encoder weights" not in generator
    assert PROMPT_CACHE not in generator


def test_what_is_done_in_turn_is_counted_once():
    preset = get_preset("causal-forcing-framewise")
    config = preset.session_config()
    plans = [
        items(required_bytes(preset, vae, config, torch.bfloat16, given_frames=given))
        for vae, given in ((None, 0), ("wan", 0), ("wan", 1))
    ]
    work = [plan.keys() & {ACTIVATIONS, "decoding", "encoding of given frames"} for plan in plans]
    assert work == [{ACTIVATIONS}, {"decoding"}, {"encoding of given frames"}]
    sizes = [plan[name] for plan, (name,) in zip(plans, work, strict=True)]
    assert sizes == sorted(sizes)
    assert plans[1][PROMPT_CACHE] == DEFAULT_CACHE_BYTES


def test_the_document_says_what_the_arithmetic_says():
    rows = re.findall(r"^\| (`.+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$", DOCUMENT.read_text(), re.MULTILINE)
    written = {}
    for names, *numbers in rows:
        first, *others = re.findall(r"`([\w-]+)`", names)
        base = first.removesuffix("-framewise")
        for name in (first, *(f"{base}-framewise{n}" if n.startswith("-") else n for n in others)):
            written[name] = numbers
    assert written.keys() == PRESETS.keys()
    for name, preset in PRESETS.items():
        dtype = torch.float32 if name == "tiny" else torch.bfloat16
        config = preset.session_config()
        plans = [required_bytes(preset, vae, config, dtype) for vae in ("wan", "lightvae")]
        plans.append(required_bytes(preset, None, config, dtype, text_encoder=False))
        digits = 2 if name == "tiny" else 1
        assert written[name] == [f"{plan.total_bytes / 1e9:.{digits}f}" for plan in plans], name


def test_sessions_multiply_their_state_and_not_the_weights():
    preset = get_preset("tiny")
    config = preset.session_config()
    one = required_bytes(preset, "wan", config, torch.float32)
    two = required_bytes(preset, "wan", config, torch.float32, sessions=2)
    session = sum(size for what, size in one.items if "keys" in what or "state" in what)
    assert two.total_bytes - one.total_bytes == session


def test_a_device_that_is_too_small_is_refused_with_the_arithmetic():
    preset = get_preset("causal-forcing-framewise")
    plan = required_bytes(preset, "wan", preset.session_config(), torch.bfloat16)
    require_memory(plan, "cuda", free=lambda device: 24 * 10**9)
    with pytest.raises(OutOfMemory) as caught:
        require_memory(plan, "cuda", free=lambda device: 16 * 10**9)
    message = caught.value.message
    assert "cuda has 16.00 GB free" in message
    for term in (
        "generator weights 2.84 GB",
        "keys and values of 21 frames 6.04 GB",
        "decoder state 1.89 GB",
        "decoding 0.64 GB",
        "= 23.39 GB",
    ):
        assert term in message
    assert int(caught.value.metadata["needed_bytes"]) == plan.needed_bytes == plan.total_bytes + RESERVE_BYTES


def test_an_unknown_vae_is_refused():
    preset = get_preset("tiny")
    with pytest.raises(InvalidRequest):
        required_bytes(preset, "vqgan", preset.session_config(), torch.float32)


def test_this_machine_has_memory():
    assert 10**8 < free_bytes("cpu") < 10**15


def test_a_container_counts_reclaimable_pages_as_free(tmp_path):
    for name, text in (("max", "1000\n"), ("current", "900\n"), ("stat", "anon 100\ninactive_file 300\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _cgroup_free(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_free(tmp_path) == 2**63
    assert _cgroup_free(tmp_path / "absent") == 2**63
