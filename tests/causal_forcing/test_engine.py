"""Loading an engine: what is refused before anything is loaded, and what a loaded one is."""

import pytest
import torch
import torch._inductor.config

from causal_forcing.compile import require_compiler
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest, OutOfMemory, SessionStateError
from causal_forcing.startup import StartUp
from causal_forcing.weights import load_transformer
from tests.causal_forcing.builders import make_engine, update


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr("causal_forcing.engine.load_transformer", lambda *_args, **_options: pytest.fail("loaded"))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"preset": "huge"}, "preset"),
        ({"preset": "tiny", "vae": "flux"}, "vae"),
        ({"preset": "tiny", "quantization": "int3"}, "quantization"),
        ({"preset": "tiny", "quantization": "fp8_e4m3fn"}, "quantization"),  # a CPU does not compute in fp8
    ],
)
def test_a_wrong_option_is_refused_before_loading(nothing_is_loaded, options, field):
    with pytest.raises(InvalidRequest) as refusal:
        Engine.load(**options)
    assert refusal.value.metadata["field"] == field
    assert str(options[field]) in str(refusal.value)


def test_compiling_without_a_compiler_is_refused_before_loading(nothing_is_loaded):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(InvalidRequest) as refusal,
    ):
        Engine.load("tiny", compiled=True)
    assert refusal.value.metadata["field"] == "compile"
    assert "C++ compiler" in str(refusal.value)


@pytest.mark.parametrize(
    ("found", "compiler", "needed"),
    [(None, "gcc", "needs Triton"), ("triton", "no-such-compiler", "needs a C compiler for Triton")],
)
def test_a_gpu_needs_triton_and_a_c_compiler_to_compile(monkeypatch, found, compiler, needed):
    monkeypatch.setattr("causal_forcing.compile.importlib.util.find_spec", lambda _name: found)
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(InvalidRequest, match=needed):
        require_compiler("cuda")


def test_loading_says_what_it_took():
    startup = StartUp()
    Engine.load("tiny", vae=None, text_encoder=False, startup=startup)
    assert list(startup.phases) == ["load"]
    assert startup.total_s > 0


def test_a_device_without_the_memory_is_refused_with_the_arithmetic(nothing_is_loaded, monkeypatch):
    monkeypatch.setattr("causal_forcing.engine.free_bytes", lambda _device: 8 * 10**9)
    with pytest.raises(OutOfMemory, match=r"8\.00 GB free, but generator weights 2\.84 GB .* 6\.04 GB"):
        Engine.load("causal-forcing-framewise", dtype=torch.bfloat16)


def test_the_embedded_model_makes_the_same_video_every_time():
    first, second = (Engine.load("tiny", vae=None) for _ in range(2))
    chunks = []
    for engine in (first, second):
        session = engine.new_session()
        session.update_prompt(update("a red circle"))
        chunks.append(session.generate_chunk())
        chunks[-1].require_finite()
    assert torch.equal(chunks[0].latents, chunks[1].latents)


def test_packing_for_few_tokens_changes_the_layout_and_nothing_else():
    packed = Engine.load("tiny", vae=None, text_encoder=False)
    plain = load_transformer(packed.preset)
    assert packed.transformer.layers[0].self_attn.q.weight.stride(0) == 1
    for name, weight in plain.state_dict().items():
        assert torch.equal(packed.transformer.state_dict()[name], weight)


def test_an_engine_without_a_part_says_which():
    engine = make_engine()
    session = engine.new_session()
    session.update_prompt(update("anything"), engine.encode_prompts(update("anything")))
    with pytest.raises(SessionStateError) as refusal:
        session.decode(session.generate_chunk())
    assert refusal.value.reason == "NO_VAE"
    with pytest.raises(SessionStateError) as refusal:
        Engine(engine.preset, engine.transformer).new_session().update_prompt(update("anything"))
    assert refusal.value.reason == "NO_TEXT_ENCODER"


def test_a_window_must_hold_a_chunk_beside_the_sink():
    engine = make_engine(chunk_frames=3)
    with pytest.raises(InvalidRequest, match="window_frames: got 4"):
        engine.new_session(engine.session_config(window_frames=4, sink_frames=2))
