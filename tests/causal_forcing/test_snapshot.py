"""Snapshots: continue bit for bit, wherever they are restored, or change nothing."""

from dataclasses import replace

import pytest
import torch

from causal_forcing.errors import InvalidRequest, OutOfMemory, SessionStateError
from causal_forcing.record import SessionRecord
from causal_forcing.sampler import Stopped
from causal_forcing.snapshot import Snapshot
from tests.causal_forcing.builders import (
    ENDLESS,
    assert_same_chunks,
    assert_same_state,
    given_latents,
    make_engine,
    open_session,
    play,
    update,
)

SCRIPT = {
    2: update("b", transition_chunks=3, policy="recache"),
    6: update("c", policy="flush"),
    8: update("d", policy="scene_cut"),
}


def go_on(session, until):
    """Return the remaining chunks of the script and their pixels."""
    made = play(session, until, {k: v for k, v in SCRIPT.items() if k > session.state.chunk_index})
    return made, [session.decode(chunk) for chunk in made]


def assert_continues_alike(session, other, until):
    chunks, pixels = go_on(session, until)
    other_chunks, other_pixels = go_on(other, until)
    assert_same_chunks(other_chunks, chunks)
    assert all(torch.equal(a, b) for a, b in zip(other_pixels, pixels, strict=True))


@pytest.fixture(scope="module")
def engines():
    return {frames: make_engine(frames, vae=True) for frames in (1, 3)}


@pytest.mark.parametrize(
    ("chunk_frames", "window", "sink_rope", "taken_at"),
    [(1, 5, "relative", taken_at) for taken_at in (0, 1, 3, 6, 9)]
    + [(3, 8, "relative", taken_at) for taken_at in (2, 7)]
    + [(1, 5, "fixed", taken_at) for taken_at in (3, 8)],
)
def test_a_restored_session_continues_bit_for_bit(engines, chunk_frames, window, sink_rope, taken_at, tmp_path):
    engine = engines[chunk_frames]
    config = {"window_frames": window, "sink_frames": 2, "sink_rope": sink_rope, "anchor_every_chunks": 4}
    session = open_session(engine, **config)
    for chunk in play(session, taken_at, SCRIPT):
        session.decode(chunk)
    if taken_at in SCRIPT:
        session.update_prompt(SCRIPT[taken_at])
    snapshot = session.snapshot()
    snapshot.save(tmp_path / "session.safetensors")
    assert_same_state(session, Snapshot.load(tmp_path / "session.safetensors"))

    other = open_session(engine, None, **config)
    other.restore(Snapshot.load(tmp_path / "session.safetensors"))
    assert_continues_alike(session, other, taken_at + 3)
    session.restore(snapshot)  # what the session did since is undone
    assert_same_state(session, snapshot)


def test_a_snapshot_keeps_what_waits_and_what_was_half_done():
    engine = make_engine(vae=True)
    session = open_session(engine, **ENDLESS)
    play(session, 5)
    session.update_prompt(update("b", transition_chunks=4))
    with pytest.raises(Stopped):
        session.generate_chunk(should_stop=lambda: True)
    session.update_prompt(update("c", policy="recache"))
    other = open_session(engine, None, **ENDLESS)
    other.restore(session.snapshot())
    assert_same_chunks(play(other, 9), play(session, 9))


def test_a_snapshot_of_given_frames():
    engine = make_engine(3, vae=True)
    session = open_session(engine, **ENDLESS)
    session.decode(session.start_from(given_latents(4)))
    other = open_session(engine, None, **ENDLESS)
    other.restore(session.snapshot())
    assert_same_chunks([other.generate_chunk()], [session.generate_chunk()])


def test_a_snapshot_is_a_copy():
    session = open_session(make_engine(vae=True), **ENDLESS)
    play(session, 4)
    snapshot = session.snapshot()
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    for chunk in play(session, 9):
        session.decode(chunk)
    session.restore(snapshot)
    for chunk in play(session, 6):
        session.decode(chunk)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot.tensors.items())
    assert snapshot.nbytes == sum(tensor.nbytes for tensor in before.values())
    frames_counter = 8  # the decoder's frame count is a tensor in a snapshot
    fresh = open_session(make_engine(vae=True), **ENDLESS)
    play(fresh, 4)
    assert snapshot.nbytes == fresh.nbytes + frames_counter


def full_snapshot():
    """Return an engine and a snapshot that has every kind of part."""
    engine = make_engine(vae=True)
    session = open_session(engine, **ENDLESS)
    for chunk in play(session, 6, {4: update("b", transition_chunks=5)}):
        session.decode(chunk)
    session.update_prompt(update("secret prompt"))
    return engine, session.snapshot()


KINDS = [
    "cache.keys.0", "cache.values.1", "cache.sink_keys.0", "decoder.frames", "text.keys.1", "text.values.0",
    "prompt.embeds", "prompt.source", "prompt.target", "prompt.waiting", "latents.5",
]  # fmt: skip


def damaged_snapshots():
    engine, good = full_snapshot()
    assert all(kind in good.tensors for kind in KINDS)
    for kind in KINDS:
        yield f"{kind} missing", engine, replace(good, tensors={n: t for n, t in good.tensors.items() if n != kind})
        tensor = good.tensors[kind]
        misshapen = tensor[:0] if tensor.ndim else tensor[None]
        yield f"{kind} misshapen", engine, replace(good, tensors=good.tensors | {kind: misshapen})
    yield "extra part", engine, replace(good, tensors=good.tensors | {"cache.keys.9": torch.zeros(1)})
    halved = good.tensors | {"cache.keys.0": good.tensors["cache.keys.0"].half()}
    yield "another dtype", engine, replace(good, tensors=halved)
    for name, value in (("format", 99), ("preset", "wan"), ("config", {})):
        yield f"another {name}", engine, replace(good, meta=good.meta | {name: value})
    for name in ("format", "preset", "config", "cursor", "counters", "prompt", "shapes"):
        yield f"no {name}", engine, replace(good, meta={k: v for k, v in good.meta.items() if k != name})


def test_a_snapshot_that_does_not_fit_changes_nothing():
    session, before = None, None
    for what, engine, snapshot in damaged_snapshots():
        if session is None:
            session = open_session(engine, "mine", **ENDLESS)
            for chunk in play(session, 3):
                session.decode(chunk)
            before = session.snapshot()
        with pytest.raises(InvalidRequest, match="snapshot") as caught:
            session.restore(snapshot)
        assert "secret prompt" not in str(caught.value), what
        assert_same_state(session, before)


def test_a_snapshot_of_another_configuration_is_refused():
    engine, snapshot = full_snapshot()
    session = open_session(engine, seed=1, **ENDLESS)
    with pytest.raises(InvalidRequest, match="snapshot.config: got .*'seed': 42.*; must be .*'seed': 1"):
        session.restore(snapshot)


def test_a_snapshot_with_a_decoder_needs_one():
    _, snapshot = full_snapshot()
    session = open_session(make_engine(), **ENDLESS)
    with pytest.raises(InvalidRequest, match="snapshot.tensors"):
        session.restore(snapshot)


@pytest.mark.parametrize("kind", [Snapshot, SessionRecord])
def test_files_of_something_else_are_refused(kind, tmp_path):
    _, snapshot = full_snapshot()
    snapshot.save(tmp_path / "snapshot")
    SessionRecord("test-1", open_session(make_engine()).config).save(tmp_path / "record")
    (tmp_path / "truncated").write_bytes((tmp_path / kind_name(kind)).read_bytes()[:-1])
    (tmp_path / "cut").write_bytes((tmp_path / kind_name(kind)).read_bytes()[:20])
    (tmp_path / "text").write_text("not a safetensors file")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    kind.load(tmp_path / kind_name(kind))
    other = "record" if kind is Snapshot else "snapshot"
    names = [other, "truncated", "cut", "text", "empty", "folder", "absent"]
    if kind is SessionRecord:
        names.remove("truncated")  # a record without chunks has no data to lose
    for name in names:
        with pytest.raises(InvalidRequest, match=f"must be a {kind_name(kind)} of this program"):
            kind.load(tmp_path / name)


def kind_name(kind):
    return "snapshot" if kind is Snapshot else "record"


def test_a_failed_session_has_no_snapshot():
    session = open_session(make_engine())
    with pytest.raises(OutOfMemory):
        session.generate_chunk(should_stop=lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(SessionStateError) as caught:
        session.snapshot()
    assert caught.value.reason == "SESSION_FAILED"
