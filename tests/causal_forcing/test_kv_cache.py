"""The ring of keys and values: which frames it holds, and that attention sees exactly those."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_forcing.config import SinkRope, TransformerConfig
from causal_forcing.errors import SessionStateError
from causal_forcing.kv_cache import CacheLayout, KeyValueCache
from tests.causal_forcing.builders import FIRST_STEPS, STEPS, embedding, make_engine, open_session, play
from tests.causal_forcing.naive import NaiveStream

TOKENS = 2
WINDOWS = [
    (5, 0, 1),
    (5, 2, 1),
    (7, 0, 3),
    (7, 1, 3),
    (9, 3, 3),
    (12, 3, 3),
    (8, 4, 3),
    (9, 5, 2),
    (4, 1, 3),
    (2, 1, 1),
]
"""(window, sink, chunk): wrapping around the ring, sinks of a part of a chunk and of more than one, and tight fits."""

CASES = [(*sizes, "fixed") for sizes in WINDOWS] + [(*sizes, "relative") for sizes in WINDOWS if sizes[1] in (1, 2, 5)]


def make_cache(capacity, sink, *, evicts=True, sink_rope=SinkRope.FIXED):
    config = TransformerConfig(dim=4, ffn_dim=4, num_heads=1, num_layers=2)
    layout = CacheLayout(capacity, sink, sink_rope, TOKENS, evicts)
    return KeyValueCache(config, layout, device=torch.device("cpu"), dtype=torch.float32)


def write(cache, frames):
    """Write frames whose keys are their position and whose values are minus that; return the plan."""
    plan = cache.plan(frames)
    tags = torch.arange(plan.start, plan.start + frames).repeat_interleave(TOKENS).view(1, 1, -1, 1).float()
    for layer in range(2):
        cache.layer(layer).write(tags.expand(-1, -1, -1, 4), -tags.expand(-1, -1, -1, 4), plan)
    return plan


def positions_seen(cache, plan):
    keys, values = cache.layer(1).read(plan)
    assert torch.equal(keys, -values)
    return sorted(int(p) for p in keys[0, 0, :, 0])


@pytest.mark.parametrize(("window", "sink", "chunk", "sink_rope"), CASES)
def test_eviction_equals_selecting_from_everything(window, sink, chunk, sink_rope):
    engine = make_engine(chunk)
    session = open_session(engine, window_frames=window, sink_frames=sink, sink_rope=sink_rope)
    oracle = NaiveStream(
        engine.transformer,
        window=window,
        sink=sink,
        relative=sink_rope == "relative",
        noise=session._noise,
        steps=STEPS,
        first_steps=FIRST_STEPS,
    )
    shape = session.config.geometry.latent_shape(chunk)
    for index in range(3 * window // chunk + 1):
        expected = oracle.generate(index, shape, embedding("a").embeds)
        torch.testing.assert_close(session.generate_chunk().latents.double(), expected, atol=1e-5, rtol=0)
    held = [*range(sink), *range(oracle.held(len(oracle.frames))[1].start, len(oracle.frames))]
    assert session.state.cache.held_positions() == held
    for layer in range(2):
        values = torch.cat([oracle.frames[p][layer][1] for p in held]).transpose(0, 1)[None]
        torch.testing.assert_close(session.state.cache.in_order(layer)[1].double(), values, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("window", "sink"), [(4, 0), (6, 0), (5, 1)])
def test_the_oracle_would_notice_another_window_or_sink(window, sink):
    engine = make_engine()
    right = play(open_session(engine, window_frames=5, sink_frames=0), 8)
    wrong = play(open_session(engine, window_frames=window, sink_frames=sink), 8)
    assert float((right[7].latents - wrong[7].latents).abs().max()) > 1e-3


def test_where_the_sink_is_rotated_to_shows():
    engine = make_engine()
    fixed = play(open_session(engine, window_frames=4, sink_frames=2, sink_rope="fixed"), 9)
    relative = play(open_session(engine, window_frames=4, sink_frames=2, sink_rope="relative"), 9)
    assert torch.equal(fixed[3].latents, relative[3].latents)  # nothing evicted yet
    assert float((fixed[8].latents - relative[8].latents).abs().max()) > 1e-3


@given(
    sink=st.integers(0, 4),
    ring=st.integers(1, 5),
    operations=st.lists(
        st.one_of(st.tuples(st.just("write"), st.integers(1, 5)), st.tuples(st.just("flush"), st.integers(1, 4)))
        | st.tuples(st.just("cut"), st.just(0)),
        max_size=12,
    ),
)
@settings(deadline=None, max_examples=150, derandomize=True, database=None)
def test_any_history_leaves_the_sink_and_the_newest_frames(sink, ring, operations):
    """The oracle is two Python lists."""
    cache, kept_sink, kept_ring, end = make_cache(sink + ring, sink), [], [], 0
    for name, number in operations:
        if name == "write":
            frames = min(number, ring)
            plan = write(cache, frames)
            for position in range(end, end + frames):
                (kept_sink if len(kept_sink) < sink else kept_ring).append(position)
            end, kept_ring = end + frames, kept_ring[-ring:]
            assert positions_seen(cache, plan) == sorted((kept_sink + kept_ring) * TOKENS)
            cache.advance(plan)
        elif name == "flush":
            cache.flush(number)
            kept_ring = kept_ring[-number:]
        else:
            cache.begin_scene()
            kept_sink, kept_ring = [], []
        assert cache.held_positions() == kept_sink + kept_ring
        rows = cache.in_order(0)[0][0, 0, ::TOKENS, 0][: len(kept_sink + kept_ring)]
        assert rows.tolist() == kept_sink + kept_ring


@given(sink=st.integers(1, 4), ring=st.integers(1, 5), chunk=st.integers(1, 5), base=st.integers(0, 10**9))
@settings(deadline=None, max_examples=100, derandomize=True, database=None)
def test_a_relative_sink_directly_precedes_the_oldest_rolling_frame(sink, ring, chunk, base):
    cache, chunk = make_cache(sink + ring, sink, sink_rope=SinkRope.RELATIVE), min(chunk, ring)
    cache.skip(base)
    cache.begin_scene()
    for _ in range(2 * (sink + ring)):
        plan = cache.plan(chunk)
        where = cache.sink_positions(plan)
        cache.advance(plan)
        rolling = [p for p in cache.held_positions() if p >= base + sink]
        moved = bool(rolling) and rolling[0] != base + sink
        assert where == (range(rolling[0] - sink, rolling[0]) if moved else None)


def test_passes_over_one_chunk_write_the_same_rows_and_nothing_moves():
    cache = make_cache(5, 1)
    storage = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    for _ in range(7):
        plans = [write(cache, 3) for _ in range(3)]
        assert plans[0] == plans[1] == plans[2]
        cache.advance(plans[0])
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == storage


def test_every_new_token_has_a_row_of_its_own():
    cache = make_cache(7, 1)
    for _ in range(12):
        plan = cache.plan(3)
        rows = plan.rows.tolist()
        assert len(rows) == 3 * TOKENS
        assert len(set(rows)) == len(rows)
        assert max(rows) < plan.visible_rows
        cache.advance(plan)


def test_without_eviction_a_full_cache_says_so_and_stays():
    cache = make_cache(5, 0, evicts=False)
    cache.advance(write(cache, 3))
    cursor = cache.cursor
    assert cache.has_room(2)
    assert not cache.has_room(3)
    with pytest.raises(SessionStateError, match="holds 5 latent frames; 3 are written and 3 more do not fit") as caught:
        cache.plan(3)
    assert caught.value.reason == "STREAM_FULL"
    assert cache.cursor == cursor
    cache.advance(write(cache, 2))
    assert cache.held_positions() == [0, 1, 2, 3, 4]


def test_bytes_are_those_of_the_arithmetic():
    plain, relative = make_cache(6, 2), make_cache(6, 2, sink_rope=SinkRope.RELATIVE)
    assert plain.nbytes == 2 * 2 * 6 * TOKENS * 4 * 4  # keys and values, layers, frames, tokens, width, bytes
    assert relative.nbytes == plain.nbytes + 2 * 2 * TOKENS * 4 * 4
