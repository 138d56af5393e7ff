"""The transformer, against the same model written a second time (naive.py) and against what it promises of itself."""

import copy

import pytest
import torch
import torch.nn.functional as F

from causal_forcing.engine import Engine
from causal_forcing.geometry import Geometry
from causal_forcing.presets import WAN_1_3B, WAN_14B
from causal_forcing.sampler import Schedule
from causal_forcing.session import Session
from causal_forcing.transformer import CausalTransformer, sinusoid, unpatchify
from tests.causal_forcing.builders import (
    TRANSFORMER,
    assert_same_chunks,
    embedding,
    given_latents,
    make_engine,
    make_transformer,
    open_session,
    play,
)
from tests.causal_forcing.naive import NaiveTransformer


@pytest.mark.parametrize("few_tokens", [None, 6])
def test_a_layout_changes_neither_names_nor_values_nor_results(few_tokens):
    plain, laid_out = make_engine(), make_engine()
    laid_out.transformer.lay_out(few_tokens)
    assert (laid_out.transformer.layers[0].ffn[0].packed is not None) == (few_tokens is not None)
    before, after = plain.transformer.state_dict(), laid_out.transformer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    attention = laid_out.transformer.layers[0].self_attn
    assert attention.k.weight.data_ptr() == attention.joint_weight[TRANSFORMER.dim :].data_ptr()  # no second copy
    copied = Engine(laid_out.preset, copy.deepcopy(laid_out.transformer), None, laid_out.text_encoder)
    theirs, ours, again = (play(open_session(engine), 8) for engine in (plain, laid_out, copied))
    assert_same_chunks(again, ours)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.latents, other.latents, atol=1e-5, rtol=0)


def masked_whole_pass(transformer, latents, *, window, sink, chunk):
    """Write all frames as context in one pass of the naive model, each chunk masked to what it may see.

    Returns:
        Per layer, per frame: un-rotated key and value.
    """
    frames = latents.shape[2]

    def visible(_layer, frame, keys, values):
        end = min(frames, (frame // chunk + 1) * chunk)
        seen = [p for p in range(end) if p < sink or p >= max(sink, end - (window - sink))]
        return [(keys[p], values[p], p) for p in seen]

    embeds = [embedding("a").embeds] * frames
    _, memory = NaiveTransformer(transformer).forward(latents, [0.0] * frames, embeds, range(frames), visible)
    return memory


@pytest.mark.parametrize(
    ("window", "sink", "chunk", "frames"), [(30, 0, 1, 6), (30, 0, 3, 9), (4, 0, 1, 9), (5, 2, 1, 9), (7, 1, 3, 12)]
)
def test_streaming_equals_one_masked_pass_over_the_whole(window, sink, chunk, frames):
    engine = make_engine(chunk)
    session = open_session(engine, window_frames=window, sink_frames=sink, sink_rope="fixed")
    latents = given_latents(frames)
    session.start_from(latents)
    whole = masked_whole_pass(engine.transformer, latents, window=window, sink=sink, chunk=chunk)
    held = session.state.cache.held_positions()
    naive = NaiveTransformer(engine.transformer)
    for layer, (keys, values) in enumerate(whole):
        ours = session.state.cache.in_order(layer)
        rows = len(held) * 6
        roped = torch.cat([naive.rope(keys[p], p, 6) for p in held]).transpose(0, 1)[None]
        torch.testing.assert_close(ours[0][:, :, :rows].double(), roped, atol=1e-5, rtol=0)
        expected = torch.cat([values[p] for p in held]).transpose(0, 1)[None]
        torch.testing.assert_close(ours[1][:, :, :rows].double(), expected, atol=1e-5, rtol=0)


def open_context(session: Session, frames):
    session._cross_boundary()
    return session._open_chunk(frames)


def test_the_velocity_is_that_of_the_naive_model():
    engine = make_engine(3)
    session = open_session(engine)
    x = given_latents(3, seed=5)
    with torch.inference_mode():
        modulation = engine.transformer.modulate(937.5)
        ours = engine.transformer(x, modulation, open_context(session, 3))

    def visible(_layer, _frame, keys, values):
        return [(keys[p], values[p], p) for p in range(3)]

    embeds = [embedding("a").embeds] * 3
    expected, _ = NaiveTransformer(engine.transformer).forward(x, [937.5] * 3, embeds, range(3), visible)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


def test_the_context_pass_writes_what_a_full_pass_at_timestep_0_does():
    engine = make_engine()
    session = open_session(engine, window_frames=3, sink_frames=1)
    play(session, 4)
    x = given_latents(1, seed=6)
    with torch.inference_mode():
        context, modulation = open_context(session, 1), engine.transformer.modulate(0.0)
        engine.transformer(x, modulation, context)
        full = [t.clone() for t in (*session.state.cache.keys, *session.state.cache.values)]
        engine.transformer(given_latents(1, seed=7), modulation, context)  # other keys and values in between
        engine.transformer.write_context(x, modulation, context)
    for ours, expected in zip((*session.state.cache.keys, *session.state.cache.values), full, strict=True):
        assert torch.equal(ours, expected)


def test_a_pass_leaves_the_cursor_and_the_past_alone():
    engine = make_engine()
    session = open_session(engine, window_frames=6)
    play(session, 3)
    cache = session.state.cache
    cursor, before = cache.cursor, [t.clone() for t in (*cache.keys, *cache.values)]
    with torch.inference_mode():
        context = open_context(session, 1)
        engine.transformer(given_latents(1), engine.transformer.modulate(1000.0), context)
    assert cache.cursor == cursor
    past = 3 * 6
    for now, then in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(now[:, :, :past], then[:, :, :past])
        assert not torch.equal(now[:, :, past:], then[:, :, past:])


def test_time_and_its_projection_are_the_naive_models():
    transformer = make_transformer()
    for timestep in (0.0, 625.0, 833.3333129882812, 1000.0):
        embedded, projected = transformer.embed_time(torch.tensor([timestep], dtype=torch.float64))
        expected = NaiveTransformer(transformer).time(timestep)
        torch.testing.assert_close(embedded[0].double(), expected[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(projected[0].double(), expected[1], atol=2e-6, rtol=0)


def test_the_sinusoid_has_cosines_first():
    wave = sinusoid(torch.tensor([2.0]), 256)
    assert wave.shape == (1, 256)
    assert wave.dtype == torch.float64
    assert float(wave[0, 0]) == pytest.approx(torch.cos(torch.tensor(2.0, dtype=torch.float64)).item(), abs=1e-12)
    assert float(wave[0, 128]) == pytest.approx(torch.sin(torch.tensor(2.0, dtype=torch.float64)).item(), abs=1e-12)


def test_patches_are_the_convolutions():
    transformer = make_transformer()
    latents = given_latents(3)
    patches = F.conv3d(latents, transformer.patch_embedding.weight, transformer.patch_embedding.bias, (1, 2, 2))
    torch.testing.assert_close(transformer.embed_patches(latents), patches.flatten(2).transpose(1, 2))


def test_unpatchify_puts_row_column_channel_back():
    shape = (1, 16, 2, 4, 6)
    latents = torch.arange(16 * 2 * 4 * 6).view(shape)
    frames = latents[0].unfold(2, 2, 2).unfold(3, 2, 2)  # [C, F, y, x, q, r]
    patches = frames.permute(1, 2, 3, 4, 5, 0).reshape(1, 2 * 2 * 3, 64)
    assert torch.equal(unpatchify(patches, shape), latents)


def test_padding_rows_are_attended_to():
    transformer = make_transformer()
    embeds = embedding("a").embeds
    keys, values = transformer.read_text(embeds).keys[0], transformer.read_text(embeds).values[0]
    assert keys.shape == values.shape == (1, 2, TRANSFORMER.text_len, 24)
    assert float(keys[:, :, -1].abs().max()) > 0.01  # zero input, but biases make it a constant row
    assert torch.equal(keys[:, :, -1], transformer.read_text(embedding("b").embeds).keys[0][:, :, -1])


def test_modules_hold_nothing_of_a_session():
    engine = make_engine(vae=True)
    before = {name: tensor.clone() for name, tensor in engine.transformer.state_dict().items()}
    attributes = [sorted(vars(module)) for module in engine.transformer.modules()]
    session = open_session(engine)
    for chunk in play(session, 3):
        session.decode(chunk)
    assert [sorted(vars(module)) for module in engine.transformer.modules()] == attributes
    for name, tensor in engine.transformer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_bfloat16_stays_close_to_float32():
    wide, narrow = make_engine(3), make_engine(3)
    narrow.transformer.to(torch.bfloat16)
    ours, expected = play(open_session(narrow), 1)[0].latents, play(open_session(wide), 1)[0].latents
    assert ours.dtype == torch.bfloat16
    error = float((ours.float() - expected).abs().mean() / expected.abs().mean())
    assert error < 0.05


@pytest.mark.parametrize(("config", "parameters"), [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)])
def test_real_models_have_the_parameters_of_their_checkpoints(config, parameters):
    with torch.device("meta"):
        transformer = CausalTransformer(config)
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    assert len(transformer.state_dict()) == 27 * config.num_layers + 15


def test_it_runs_on_the_meta_device():
    with torch.device("meta"):
        transformer = CausalTransformer(WAN_1_3B)
    schedule = Schedule.of(transformer, (1000,), None)
    assert schedule.steps[0].modulation.blocks.shape == (30, 6, 1536)
    assert Geometry(480, 832).tokens_per_frame == 1560
