import copy
import dataclasses
import os
import re

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from causal_forcing.compile import (
    COMPILE_CACHE_VARIABLE,
    GRAPHS_PER_SIZE,
    compile_transformer,
    use_compile_cache,
    warm_up,
)
from causal_forcing.engine import Engine
from tests.causal_forcing.builders import TRANSFORMER, make_engine, open_session, play, update

PASSES = 2


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled(engine, backend, *, by_block=False):
    """Return the same engine with its passes compiled; the given one stays as it is.

    Backends in order of cost: ``eager`` only traces, ``aot_eager`` also makes mutation explicit, ``inductor`` generates
    code.
    """
    transformer = copy.deepcopy(engine.transformer)
    compile_transformer(transformer, backend=backend, by_block=by_block)
    return Engine(engine.preset, transformer, engine.vae, engine.text_encoder)


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("chunk_frames", "window_frames"), [(1, 4), (3, 7)])
def test_a_full_window_never_compiles_again(chunk_frames, window_frames):
    """Chunks of three in a ring of seven wrap around its end at another place each time."""
    eager = make_engine(chunk_frames)
    engine = compiled(eager, "aot_eager")
    config = open_session(engine, window_frames=window_frames).config
    warm_up(engine, config)
    assert not counters["graph_break"]
    assert graphs() <= PASSES * GRAPHS_PER_SIZE
    with torch.compiler.set_stance("fail_on_recompile"):
        ours = play(open_session(engine, window_frames=window_frames), 12)
    theirs = play(open_session(eager, window_frames=window_frames), 12)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.latents, other.latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("layout", ["plain", "joined", "packed"])
def test_all_blocks_share_their_graphs(layers, layout):
    eager = make_engine(config=dataclasses.replace(TRANSFORMER, num_layers=layers))
    if layout != "plain":
        eager.transformer.lay_out(6 if layout == "packed" else None)
    engine = compiled(eager, "aot_eager", by_block=True)
    warm_up(engine, open_session(engine, window_frames=4).config)
    assert not counters["graph_break"]
    assert graphs() <= PASSES * GRAPHS_PER_SIZE
    with torch.compiler.set_stance("fail_on_recompile"):
        ours = play(open_session(engine, window_frames=4), 9)
    theirs = play(open_session(eager, window_frames=4), 9)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.latents, other.latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sink_rope", ["fixed", "relative"])
def test_sinks_are_warmed_up_too(sink_rope):
    engine = compiled(make_engine(), "eager")
    options = {"window_frames": 5, "sink_frames": 2, "sink_rope": sink_rope}
    warm_up(engine, open_session(engine, **options).config)
    with torch.compiler.set_stance("fail_on_recompile"):
        play(open_session(engine, **options), 9)


def test_a_session_without_a_window_is_warmed_up_to_its_end():
    engine = compiled(make_engine(), "eager")
    options = {"window_frames": None, "max_frames": 4}
    warm_up(engine, open_session(engine, **options).config)
    with torch.compiler.set_stance("fail_on_recompile"):
        play(open_session(engine, **options), 4)


def test_a_cold_start_is_what_the_stance_refuses():
    engine = compiled(make_engine(), "eager")
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="fail_on_recompile"):
        open_session(engine).generate_chunk()


def test_a_new_prompt_and_a_scene_cut_do_not_compile():
    engine = compiled(make_engine(), "eager")
    warm_up(engine, open_session(engine).config)
    session = open_session(engine)
    play(session, 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for policy in ("cross_attention", "flush", "recache", "scene_cut"):
            session.update_prompt(update(policy, policy=policy))
            session.generate_chunk()


def test_compiled_code_is_kept_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv(COMPILE_CACHE_VARIABLE, str(tmp_path / "compiled"))
    assert use_compile_cache() == tmp_path / "compiled"
    assert (tmp_path / "compiled").is_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    assert use_compile_cache() == tmp_path / "torch"  # torch's own variable wins


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generated_code_equals_eager_and_never_copies_the_cache():
    """The context pass on a full window; the forward pass is made of the same blocks."""
    eager = make_engine()
    engine = compiled(eager, "inductor")
    ours, theirs = (play_in_eager(eager, 6) for _ in range(2))
    latents = torch.randn(ours.config.geometry.latent_shape(1))
    with torch.inference_mode():
        contexts = [session._open_chunk(1) for session in (ours, theirs)]
        modulation = engine.transformer.modulate(0.0)
        eager.transformer.write_context(latents, modulation, contexts[1])
        _, codes = run_and_get_code(engine.transformer.write_context, latents, modulation, contexts[0])
    for mine, other in zip(ours.state.cache.keys, theirs.state.cache.keys, strict=True):
        assert torch.allclose(mine, other, atol=1e-5, rtol=0)
    assert len(codes) == 1
    sizes = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", codes[0])
    assert sizes  # the pattern still finds allocations
    rows = str(ours.state.cache.keys[0].shape[2])
    assert not [size for size in sizes if rows in size.split(", ")], "a buffer as long as the cache"


def play_in_eager(engine, chunks):
    session = open_session(engine, window_frames=5)  # 30 rows, a number that no other size is
    play(session, chunks)
    return session
