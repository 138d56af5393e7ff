"""Records: exact restores equal continuing bit for bit, fast ones a rebuild; bounded ones drop only what they may."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.record import RestoreMode, SessionRecord
from causal_forcing.session import Chunk
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import WanVae
from tests.causal_forcing.builders import (
    ENDLESS,
    assert_same_chunks,
    given_latents,
    latents_of,
    make_engine,
    make_vae,
    open_session,
    play,
    update,
)

SCRIPT = {
    2: update("b", transition_chunks=3, policy="recache"),
    6: update("c", policy="flush"),
    8: update("d", policy="scene_cut"),
    11: update("e", transition_chunks=4, transition="slerp"),
    13: update("f", policy="recache"),
}
WINDOWS = {
    "plain": {"window_frames": 6},
    "relative": {"window_frames": 6, "sink_frames": 2},
    "fixed": {"window_frames": 6, "sink_frames": 2, "sink_rope": "fixed"},
    "anchors": {"window_frames": 6, "sink_frames": 1, "anchor_every_chunks": 3},
    "no window": {"window_frames": None, "max_frames": 48},
}


@pytest.fixture(scope="module")
def engines():
    return {frames: make_engine(frames) for frames in (1, 3)}


def record_of(session, chunks, script=None, *, given=0, keep_all=True):
    record = SessionRecord(session.engine.preset.name, session.config, keep_all=keep_all)
    if given:
        record.append(session.start_from(given_latents(given)), session.state.prompt.update, given=True)
    play(session, chunks, script, record)
    return record


def saved(record, folder):
    record.save(folder / "record.safetensors")
    return SessionRecord.load(folder / "record.safetensors")


def rest(script, session):
    return {k: v for k, v in script.items() if k >= session.state.chunk_index}


# Exact


@pytest.mark.parametrize(
    ("chunk_frames", "window", "given"),
    [(frames, window, 0) for frames in (1, 3) for window in WINDOWS] + [(1, "relative", 4), (3, "anchors", 4)],
)
def test_an_exact_restore_continues_bit_for_bit(engines, chunk_frames, window, given, tmp_path):
    session, truth, restored = open_session(engines[chunk_frames], **WINDOWS[window]), [], {}
    record = record_of(session, 0, given=given)
    for stop in (1, 4, 7, 9, 12, 14):
        truth += play(session, stop, rest(SCRIPT, session), record)
        restored[stop] = saved(record, tmp_path).restore(session.engine, RestoreMode.EXACT)
    truth = {chunk.index: chunk for chunk in truth}
    for stop, ours in restored.items():
        expected = [truth[index] for index in range(stop, min(stop + 3, 14))]
        assert_same_chunks(play(ours, min(stop + 3, 14), rest(SCRIPT, ours)), expected)


@pytest.mark.parametrize("anchors", [{}, {"anchor_every_chunks": 7}])
@pytest.mark.parametrize("moved_at", [5, 8, 9])
def test_an_exact_restore_repeats_a_fast_one(engines, anchors, moved_at, tmp_path):
    """A session that moved to another engine (at 8 with a switch waiting) goes on in its record."""
    session = open_session(engines[3], **WINDOWS["relative"], **anchors)
    record = record_of(session, moved_at, SCRIPT)
    moved = saved(record, tmp_path).restore(engines[3], RestoreMode.FAST)
    play(moved, 12, rest(SCRIPT, moved), record)
    assert record.exact_start == max(moved_at, 7 if anchors else 0)
    again = saved(record, tmp_path).restore(engines[3], RestoreMode.EXACT)
    assert_same_chunks(play(again, 14, rest(SCRIPT, again)), play(moved, 14, rest(SCRIPT, moved)))


def test_an_exact_restore_repeats_the_transition_it_is_in(engines):
    session = open_session(engines[1], **ENDLESS)
    record = record_of(session, 5, {3: update("b", transition_chunks=6, policy="recache")})
    restored = record.restore(engines[1], RestoreMode.EXACT)
    assert_same_chunks(play(restored, 10), play(session, 10))


# Fast


@pytest.mark.parametrize(
    ("chunk_frames", "given", "chunks", "config"),
    [
        (1, 0, 5, {"window_frames": 6}),
        (3, 0, 2, {"window_frames": 8, "sink_frames": 1}),
        (3, 1, 2, {"window_frames": 8, "sink_frames": 2, "sink_rope": "fixed"}),
        (3, 7, 2, {"window_frames": 12}),
        (3, 7, 1, {"window_frames": 12}),  # only given frames so far: the next chunk takes the first chunk's steps
        (3, 2, 4, {"window_frames": None, "max_frames": 24}),
    ],
)
def test_a_fast_restore_is_exact_while_nothing_was_evicted(engines, chunk_frames, given, chunks, config):
    """... and the prompt has not changed: also where passes and sinks do not line up."""
    session = open_session(engines[chunk_frames], **config)
    record = record_of(session, chunks, given=given)
    restored = record.restore(engines[chunk_frames])
    assert_same_chunks(play(restored, chunks + 4), play(session, chunks + 4))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("chunk_frames", "stops"), [(1, (4, 7, 12)), (3, (9,))])
def test_a_fast_restore_equals_a_rebuild_of_the_running_session(engines, chunk_frames, window, stops):
    for stop in stops:
        session = open_session(engines[chunk_frames], **WINDOWS[window])
        record = record_of(session, stop, SCRIPT)
        restored = record.restore(session.engine, RestoreMode.FAST)
        session.rebuild_cache()
        expected = play(session, stop + 2, rest(SCRIPT, session))
        assert_same_chunks(play(restored, stop + 2, rest(SCRIPT, restored)), expected)


def test_a_fast_restore_after_eviction_is_close(engines):
    session = open_session(engines[1], window_frames=6)
    record = record_of(session, 14)
    restored = record.restore(engines[1])
    truth = play(session, 15)[0].latents
    other = play(open_session(engines[1], "z", window_frames=6), 15)[14].latents
    error = float((play(restored, 15)[0].latents - truth).norm())
    assert 0 < error < 0.3 * float((other - truth).norm())


# The decoder


@pytest.mark.parametrize("mode", list(RestoreMode))
@pytest.mark.parametrize("script", [{}, {40: update("b", policy="scene_cut")}])
def test_the_decoder_is_primed_exactly(mode, script):
    engine = replace(make_engine(), vae=make_vae(num_res_blocks=2))  # the real depth, which the reach follows from
    chunks = WanVae.REACH + 7
    small = {"height": 16, "width": 16, "window_frames": 2, "denoising_steps": (1000,), "first_chunk_steps": None}
    session = open_session(engine, **small)
    record = SessionRecord(engine.preset.name, session.config, keep_all=mode is RestoreMode.EXACT)
    for index in range(chunks):
        for chunk in play(session, index + 1, script, record):
            session.decode(chunk)
    following = session.generate_chunk()
    restored = record.restore(engine, mode)
    assert torch.equal(restored.decode(following), session.decode(following))


# Bounded records


def fake_chunk(index, session, *, frames=1, applied=False):
    latents = torch.full(session.config.geometry.latent_shape(frames), float(index))
    return Chunk(index, index, latents, index == 0, "a", applied, torch.tensor(True))


@pytest.mark.parametrize(
    ("config", "keep_all", "kept_frames"),
    [
        ({"window_frames": 6}, False, WanVae.REACH),
        ({"window_frames": 50}, False, 50),
        ({"window_frames": 6, "sink_frames": 3}, False, WanVae.REACH + 3),
        ({"window_frames": 6, "anchor_every_chunks": 50}, True, 49 + 6),
        ({"window_frames": 6, "anchor_every_chunks": 5}, True, WanVae.REACH),
        ({"window_frames": 6}, True, 240),
        ({"window_frames": 6, "anchor_every_chunks": 50}, False, WanVae.REACH),
    ],
)
def test_a_record_keeps_what_it_needs_and_no_more(config, keep_all, kept_frames):
    session = open_session(make_engine(), **config)
    record = SessionRecord("test-1", session.config, keep_all=keep_all)
    most = 0
    for index in range(240):
        record.append(fake_chunk(index, session, applied=index == 0), update("a"))
        most = max(most, record.nbytes)
    bytes_per_frame = 16 * 4 * 6 * 4
    assert record.nbytes <= most <= (kept_frames + 1) * bytes_per_frame
    last = record.chunks[-1].latents
    assert torch.equal(last, torch.full_like(last, 239))


@pytest.mark.parametrize(
    ("chunks", "window", "anchor_every", "cut_at"),
    [
        (60, 5, None, None),
        (60, 43, None, None),  # the cache reaches further back than the decoder
        (60, 5, None, 50),
        (60, 5, 8, None),
        (60, 5, 8, 50),
        (60, 5, 8, 55),
        (84, 5, 42, None),  # the last anchor is further back than the decoder reaches
    ],
)
def test_a_bounded_record_restores_like_an_unbounded_one(engines, chunks, window, anchor_every, cut_at, tmp_path):
    engine, keep_all = engines[1], anchor_every is not None
    config = {"window_frames": window, "sink_frames": 2, "denoising_steps": (1000,), "first_chunk_steps": None}
    script = {20: update("b", policy="recache")} | ({cut_at: update("c", policy="scene_cut")} if cut_at else {})
    session = open_session(engine, **config, anchor_every_chunks=anchor_every)
    bounded = SessionRecord(engine.preset.name, session.config, keep_all=keep_all)
    unbounded = SessionRecord(engine.preset.name, session.config)
    unbounded._drop_unneeded = lambda: None
    for index in range(chunks):
        for chunk in play(session, index + 1, script):
            for record in (bounded, unbounded):
                record.append(chunk, session.state.prompt.update)
    assert bounded.nbytes < 0.85 * unbounded.nbytes
    bounded = saved(bounded, tmp_path)
    for mode in [RestoreMode.FAST] + [RestoreMode.EXACT] * keep_all:
        ours, theirs = bounded.restore(engine, mode), unbounded.restore(engine, mode)
        expected = play(theirs, chunks + 2)
        assert_same_chunks(play(ours, chunks + 2), expected)
        if mode is RestoreMode.EXACT:
            assert_same_chunks(play(session, chunks + 2), expected)


@pytest.mark.parametrize("anchors", [None, 50])
def test_what_was_let_go_cannot_be_restored_exactly(engines, anchors):
    session = open_session(
        engines[1], window_frames=3, denoising_steps=(1000,), first_chunk_steps=None, anchor_every_chunks=anchors
    )
    record = record_of(session, 95, keep_all=False)
    with pytest.raises(SessionStateError) as caught:
        record.restore(engines[1], RestoreMode.EXACT)
    assert caught.value.reason == "NOT_EXACT"
    record.restore(engines[1], RestoreMode.FAST)


# Anchors


def test_an_anchor_is_a_rebuild_at_its_boundary_and_changes_nothing_before(engines):
    engine = engines[1]
    plain = open_session(engine, **ENDLESS)
    expected = play(plain, 6)
    anchored = open_session(engine, **ENDLESS, anchor_every_chunks=6)
    assert_same_chunks(play(anchored, 6), expected)
    plain.rebuild_cache()
    assert_same_chunks(play(anchored, 10), play(plain, 10))


def test_anchors_are_deterministic_and_show(engines):
    config = ENDLESS | {"anchor_every_chunks": 4}
    first = play(open_session(engines[1], **config), 12)
    assert_same_chunks(play(open_session(engines[1], **config), 12), first)
    without = play(open_session(engines[1], **ENDLESS), 12)
    # Nothing was evicted when chunk 4 was made, so the first anchor to show is that of chunk 8.
    difference = [float((a.latents - b.latents).abs().max()) for a, b in zip(first, without, strict=True)]
    assert max(difference[:8]) < 1e-5
    assert difference[8] > 1e-4


def test_an_exact_restore_replays_from_the_last_anchor_only(engines, monkeypatch):
    session = open_session(engines[1], window_frames=3, anchor_every_chunks=4)
    record = record_of(session, 11)
    assert record.exact_start == 8
    written, write_context = [], CausalTransformer.write_context

    def count(transformer, latents, *rest):
        written.append(latents.shape[2])
        write_context(transformer, latents, *rest)

    monkeypatch.setattr(CausalTransformer, "write_context", count)
    record.restore(engines[1], RestoreMode.EXACT)
    assert len(written) == 3 + 3  # the anchor's window, and chunks 8, 9, 10


# Refusals


def test_a_record_of_another_model_is_refused(engines):
    record = record_of(open_session(engines[1]), 2)
    with pytest.raises(InvalidRequest, match="record.preset: got 'test-1'; must be 'test-3', as in this engine"):
        record.restore(engines[3])


def test_an_empty_record_restores_to_a_fresh_session(engines, tmp_path):
    session = open_session(engines[1])
    record = saved(SessionRecord("test-1", session.config), tmp_path)
    for mode in RestoreMode:
        restored = record.restore(engines[1], mode)
        restored.update_prompt(update("a"))
        assert_same_chunks(play(restored, 2), play(open_session(engines[1]), 2))


def test_chunks_must_come_in_order_and_with_their_prompts(engines):
    session = open_session(engines[1])
    chunks = play(session, 3)
    record = SessionRecord("test-1", session.config)
    with pytest.raises(ValueError, match="must be recorded with its update"):
        record.append(chunks[0])
    with pytest.raises(ValueError, match="chunk 1 after 0 chunks"):
        record.append(chunks[1])
    assert record.chunks == []
    record.append(chunks[0], update("a"))
    with pytest.raises(ValueError, match="chunk 2 after 1 chunks"):
        record.append(chunks[2])


def test_a_record_copies_what_it_is_given(engines):
    chunk = open_session(engines[1]).generate_chunk()
    record = SessionRecord("test-1", open_session(engines[1]).config)
    record.append(replace(chunk, latents=chunk.latents.clone()), update("a"))
    before = record.chunks[0].latents.clone()
    with torch.inference_mode():
        chunk.latents.zero_()
    assert torch.equal(record.chunks[0].latents, before)


def test_a_saved_record_is_the_same(engines, tmp_path):
    session = open_session(engines[3], **WINDOWS["relative"])
    record = record_of(session, 9, SCRIPT, given=2)
    again = saved(record, tmp_path)
    assert (again.preset, again.config, again.keep_all) == (record.preset, record.config, record.keep_all)
    assert again.nbytes == record.nbytes == latents_of(record.chunks).nbytes
    for ours, expected in zip(again.chunks, record.chunks, strict=True):
        assert (ours.frames, ours.given, ours.update) == (expected.frames, expected.given, expected.update)
        assert torch.equal(ours.latents, expected.latents)


def test_a_record_file_with_a_damaged_list_is_refused(engines, tmp_path):
    for meta in ("[]", '{"format": 1}', '{"format": 1, "preset": "x", "config": {"colour": 1}, "chunks": []}', "{"):
        save_file({}, tmp_path / "bad", metadata={"record": meta})
        with pytest.raises(InvalidRequest, match="record"):
            SessionRecord.load(tmp_path / "bad")
