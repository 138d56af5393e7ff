"""What a prompt switch does to the next chunk, to the cache, and to later chunks; and when it happens."""

import pytest
import torch

from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from causal_forcing.sampler import Stopped
from tests.causal_forcing.builders import (
    ENDLESS,
    assert_same_chunks,
    embedding,
    latents_of,
    make_engine,
    open_session,
    play,
    update,
)
from tests.causal_forcing.naive import NaiveTransformer, slerp_by_hand

A, B, C = (embedding(name).embeds for name in "abc")


def cached(session):
    """Return each held frame's keys and values: position -> one tensor of all layers."""
    cache = session.state.cache
    layers = [torch.cat(cache.in_order(layer)) for layer in range(len(cache.keys))]
    return {p: torch.cat(layers)[:, :, 6 * i : 6 * (i + 1)] for i, p in enumerate(cache.held_positions())}


def embeddings_of(session, chunks):
    """Return the embedding that each of the next chunks is made with; check that its text memory is that one's."""
    used = []
    for _ in range(chunks):
        session.generate_chunk()
        used.append(session.state.prompt.embeds.clone())
        text = session.engine.transformer.read_text(used[-1])
        assert torch.equal(torch.stack(session.state.text.keys), torch.stack(text.keys))
        assert torch.equal(torch.stack(session.state.text.values), torch.stack(text.values))
    return used


def cross(session):
    with torch.inference_mode():
        session._cross_boundary()


# When


def test_an_update_takes_effect_at_the_next_chunk_and_is_named_by_it():
    session = open_session(make_engine())
    chunks = play(session, 6, {2: update("b"), 5: update("c", policy="recache")})
    assert [chunk.prompt_id for chunk in chunks] == ["a", "a", "b", "b", "b", "c"]
    assert [chunk.prompt_applied for chunk in chunks] == [True, False, True, False, False, True]


def test_an_update_replaced_before_the_boundary_never_happened():
    engine = make_engine()
    session = open_session(engine)
    play(session, 2)
    session.update_prompt(update("b", policy="scene_cut"))
    session.update_prompt(update("c"))
    assert_same_chunks(play(session, 5), play(open_session(engine), 5, {2: update("c")})[2:])


def test_an_update_between_two_tries_waits_for_the_next_boundary():
    engine = make_engine()
    session = open_session(engine)
    play(session, 2)
    session.update_prompt(update("b", policy="recache"))
    with pytest.raises(Stopped):
        session.generate_chunk(should_stop=lambda: True)
    session.update_prompt(update("c", policy="flush"))
    expected = play(open_session(engine), 6, {2: update("b", policy="recache"), 3: update("c", policy="flush")})
    assert_same_chunks(play(session, 6), expected[2:])
    assert [chunk.prompt_applied for chunk in expected] == [True, False, True, True, False, False]


def test_an_update_after_a_stopped_chunk_that_had_none_waits_too():
    engine = make_engine()
    session = open_session(engine)
    play(session, 2)
    with pytest.raises(Stopped):
        session.generate_chunk(should_stop=lambda: True)
    session.update_prompt(update("b"))
    assert_same_chunks(play(session, 5), play(open_session(engine), 5, {3: update("b")})[2:])


def test_a_rejected_update_does_not_replace_one_that_waits():
    engine = make_engine()
    session = open_session(engine)
    play(session, 1)
    session.update_prompt(update("b"))
    with pytest.raises(InvalidRequest):
        session.update_prompt(update("c"), [])
    assert_same_chunks(play(session, 3), play(open_session(engine), 3, {1: update("b")})[1:])


# Policies


def test_cross_attention_leaves_the_remembered_frames_alone():
    session = open_session(make_engine(), **ENDLESS)
    play(session, 7)
    before = cached(session)
    session.update_prompt(update("b"))
    cross(session)
    assert all(torch.equal(tensor, before[p]) for p, tensor in cached(session).items())
    expected = session.engine.transformer.read_text(B)
    assert all(torch.equal(a, b) for a, b in zip(session.state.text.keys, expected.keys, strict=True))


def rebuild_by_hand(session, runs, embeds):
    """Return position -> keys and values, from the naive model: one context pass per run, each seeing all before it."""
    model, config = NaiveTransformer(session.engine.transformer), session.config
    known = {}
    for run in runs:
        latents = torch.cat([frame_latents(session, p) for p in run], dim=2)
        rolling = [p for p in [*known, *run] if p >= config.sink_frames]
        moves = config.sink_rope == "relative" and rolling and rolling[0] > config.sink_frames

        def place(p, moved=rolling[0] - config.sink_frames if moves else 0):
            return p + moved if p < config.sink_frames else p

        def visible(layer, _frame, keys, values, run=run, place=place, known=known):
            own = [(keys[i], values[i], place(p)) for i, p in enumerate(run)]
            return [(*memory[layer], place(p)) for p, memory in known.items()] + own

        _, memory = model.forward(latents, [0.0] * len(run), [embeds] * len(run), list(run), visible)
        known |= {p: [(keys[i], values[i]) for keys, values in memory] for i, p in enumerate(run)}
    return known


def frame_latents(session, position):
    for start, latents in session.state.latents.items():
        if start <= position < start + latents.shape[2]:
            return latents[:, :, position - start : position - start + 1]
    raise AssertionError(position)


@pytest.mark.parametrize(
    ("chunk_frames", "config", "chunks", "runs"),
    [
        (1, {"window_frames": 4}, 7, [[3], [4], [5], [6]]),
        (1, {"window_frames": 5, "sink_frames": 2}, 7, [[0], [1], [4], [5], [6]]),
        (1, {"window_frames": 5, "sink_frames": 2, "sink_rope": "fixed"}, 7, [[0], [1], [4], [5], [6]]),
        (3, {"window_frames": 7}, 2, [[0, 1, 2], [3, 4, 5]]),
        (3, {"window_frames": 7}, 4, [[5], [6, 7, 8], [9, 10, 11]]),
        (3, {"window_frames": 9, "sink_frames": 3}, 5, [[0, 1, 2], [9, 10, 11], [12, 13, 14]]),
        (3, {"window_frames": 8, "sink_frames": 1}, 2, [[0, 1, 2], [3, 4, 5]]),
        (3, {"window_frames": 6, "sink_frames": 1}, 2, [[0, 1, 2], [3, 4, 5]]),
        (3, {"window_frames": 6, "sink_frames": 1}, 4, [[0], [7, 8], [9, 10, 11]]),
    ],
)
def test_recache_equals_rebuilding_by_hand(chunk_frames, config, chunks, runs):
    """Each run of the table is one context pass: the held part of the pass that first wrote those frames."""
    session = open_session(make_engine(chunk_frames), **config)
    play(session, chunks)
    held = [p for run in runs for p in run]
    assert session.state.cache.held_positions() == held
    session.update_prompt(update("b", policy="recache"))
    cross(session)
    assert session.state.cache.held_positions() == held
    expected = rebuild_by_hand(session, runs, B)
    for layer in range(2):
        values = torch.cat([expected[p][layer][1] for p in held]).transpose(0, 1)[None]
        ours = session.state.cache.in_order(layer)[1][:, :, : values.shape[2]]
        torch.testing.assert_close(ours.double(), values, atol=1e-5, rtol=0)


def test_recache_equals_having_been_under_that_prompt_all_along():
    engine = make_engine(3)
    session = open_session(engine, window_frames=9)
    chunks = play(session, 3)
    session.update_prompt(update("b", policy="recache"))
    cross(session)
    other = open_session(engine, "b", window_frames=9)
    other.start_from(latents_of(chunks))
    assert dict.fromkeys(cached(other), True) == dict.fromkeys(range(9), True)
    for p, tensor in cached(other).items():
        assert torch.equal(cached(session)[p], tensor)


@pytest.mark.parametrize(
    ("chunk_frames", "config", "chunks", "kept"),
    [
        (1, {"window_frames": 5}, 8, [6, 7]),
        (1, ENDLESS, 8, [0, 1, 6, 7]),
        (1, ENDLESS | {"sink_rope": "fixed"}, 8, [0, 1, 6, 7]),
        (3, {"window_frames": 9, "sink_frames": 1}, 4, [0, 10, 11]),
        (1, {"window_frames": 5}, 2, [0, 1]),
        (1, ENDLESS, 3, [0, 1, 2]),
    ],
)
def test_flush_keeps_the_sink_and_the_last_two_frames(chunk_frames, config, chunks, kept):
    engine = make_engine(chunk_frames)
    session = open_session(engine, **config)
    play(session, chunks)
    before = cached(session)
    session.update_prompt(update("b", policy="flush"))
    cross(session)
    after = cached(session)
    assert list(after) == kept
    for position in kept:
        assert torch.equal(after[position], before[position])


def test_after_a_flush_the_stream_goes_on_as_if_the_others_had_never_been():
    """The same frames, put into another ring by hand: only their keys, values and positions count."""
    engine = make_engine()
    session = open_session(engine, window_frames=5)
    play(session, 8)
    frames = cached(session)
    session.update_prompt(update("b", policy="flush"))
    ours = play(session, 13)

    by_hand = open_session(engine, "b", window_frames=5)
    state = by_hand.state
    state.chunk_index, state.scene_chunks = 8, 8
    state.cache.rewind(ring_start=6, end=8)
    for layer, (keys, values) in enumerate(zip(state.cache.keys, state.cache.values, strict=True)):
        for slot, position in enumerate((6, 7)):
            rows = slice(6 * slot, 6 * (slot + 1))
            with torch.inference_mode():
                keys[:, :, rows], values[:, :, rows] = frames[position][2 * layer : 2 * layer + 2]
    assert_same_chunks(ours, play(by_hand, 13))


@pytest.mark.parametrize(("chunk_frames", "config"), [(1, ENDLESS), (3, {"window_frames": 7, "sink_frames": 1})])
def test_a_scene_cut_equals_a_fresh_session_at_the_same_chunk(chunk_frames, config):
    engine = make_engine(chunk_frames, vae=True)
    session = open_session(engine, **config)
    before_cut = play(session, 5)
    for chunk in before_cut:
        session.decode(chunk)
    session.update_prompt(update("b", policy="scene_cut"))
    cut = play(session, 10)

    fresh = open_session(engine, "b", **config)
    fresh.state.chunk_index = 5
    expected = play(fresh, 10)
    torch.testing.assert_close(latents_of(cut), latents_of(expected), atol=1e-4, rtol=0)
    assert [chunk.starts_scene for chunk in cut] == [True] + [False] * 4
    assert [chunk.start_frame for chunk in cut] == [(5 + i) * chunk_frames for i in range(5)]
    decoder = engine.vae.new_decoder_state(session.config.geometry)
    for chunk in cut[:3]:
        with torch.inference_mode():
            assert torch.equal(session.decode(chunk), engine.vae.decode(chunk.latents, decoder))


def test_a_policy_on_the_first_prompt_changes_nothing():
    engine = make_engine()
    expected = play(open_session(engine, "b"), 3)
    for policy in ("recache", "flush", "scene_cut"):
        session = open_session(engine, None)
        session.update_prompt(update("b", policy=policy))
        assert_same_chunks(play(session, 3), expected)


# Blends and transitions


def test_weighted_prompts_are_blended():
    session = open_session(make_engine(), None)
    prompts = (WeightedPrompt("a", 1), WeightedPrompt("b", 3))
    session.update_prompt(PromptUpdate(prompts))
    mixed = (A + 3 * B) / 4
    expected = mixed * ((A.norm() + 3 * B.norm()) / 4 / mixed.norm())
    torch.testing.assert_close(embeddings_of(session, 1)[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", ["cross_attention", "recache", "flush", "scene_cut"])
def test_a_transition_moves_by_equal_shares_and_ends_on_the_target(policy):
    session = open_session(make_engine())
    play(session, 3)
    session.update_prompt(update("b", transition_chunks=4, policy=policy))
    used = embeddings_of(session, 6)
    for share, embeds in zip((0.25, 0.5, 0.75), used, strict=False):
        torch.testing.assert_close(embeds, (1 - share) * A + share * B, atol=1e-6, rtol=0)
    assert all(torch.equal(embeds, B) for embeds in used[3:])


@pytest.mark.parametrize("count", [0, 1])
def test_no_transition_and_one_of_a_single_chunk_switch_at_once(count):
    session = open_session(make_engine())
    play(session, 2)
    session.update_prompt(update("b", transition_chunks=count))
    assert torch.equal(embeddings_of(session, 1)[0], B)


def test_a_transition_of_the_first_prompt_begins_with_it():
    session = open_session(make_engine(), None)
    session.update_prompt(update("b", transition_chunks=4))
    assert torch.equal(embeddings_of(session, 1)[0], B)


def test_a_slerp_transition_turns_each_row_by_equal_angles():
    session = open_session(make_engine())
    play(session, 1)
    session.update_prompt(update("b", transition_chunks=3, transition="slerp"))
    used = embeddings_of(session, 3)

    for share, embeds in zip((1 / 3, 2 / 3), used, strict=False):
        torch.testing.assert_close(embeds.double(), slerp_by_hand(A, B, share), atol=1e-5, rtol=0)
    assert torch.equal(used[2], B)


def test_an_update_during_a_transition_starts_from_where_it_is():
    session = open_session(make_engine())
    play(session, 1)
    session.update_prompt(update("b", transition_chunks=4))
    used = embeddings_of(session, 2)
    session.update_prompt(update("c", transition_chunks=2))
    used += embeddings_of(session, 2)
    half = (A + B) / 2
    torch.testing.assert_close(used[1], half, atol=1e-6, rtol=0)
    torch.testing.assert_close(used[2], (half + C) / 2, atol=1e-6, rtol=0)
    assert torch.equal(used[3], C)


def test_a_negligible_transition_snaps():
    session = open_session(make_engine())
    play(session, 1)
    near = embedding("a")
    object.__setattr__(near, "embeds", A + 1e-4)
    session.update_prompt(update("near", transition_chunks=8), [near])
    assert torch.equal(embeddings_of(session, 1)[0], A + 1e-4)


def test_a_transition_with_recache_rebuilds_at_every_step_and_a_flush_happens_once():
    session = open_session(make_engine(), window_frames=4)
    play(session, 5)
    session.update_prompt(update("b", transition_chunks=3, policy="recache"))
    for share in (1 / 3, 2 / 3, 1):
        cross(session)
        held = session.state.cache.held_positions()
        expected = rebuild_by_hand(session, [[p] for p in held], torch.lerp(A, B, share))
        values = torch.cat([expected[p][1][1] for p in held]).transpose(0, 1)[None]
        torch.testing.assert_close(session.state.cache.in_order(1)[1].double(), values, atol=1e-5, rtol=0)
        session.generate_chunk()
    session.update_prompt(update("c", transition_chunks=3, policy="flush"))
    sizes = []
    for _ in range(3):
        session.generate_chunk()
        sizes.append(len(session.state.cache.held_positions()))
    assert sizes == [3, 4, 4]
