"""Streams: deterministic, isolated from each other, causal, resettable, restorable, and without a last position."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.noise import SeededNoise
from tests.causal_forcing.builders import (
    ENDLESS,
    FIRST_STEPS,
    STEPS,
    assert_same_chunks,
    assert_same_state,
    embedding,
    given_latents,
    latents_of,
    make_engine,
    open_session,
    play,
    update,
)

ROOT = Path(__file__).parents[2]


def fingerprint(seed):
    """Return a hash of a short stream's latents and pixels."""
    session = open_session(make_engine(vae=True), seed=seed, **ENDLESS)
    digest = hashlib.sha256()
    for chunk in play(session, 7):
        digest.update(chunk.latents.numpy().tobytes() + session.decode(chunk).numpy().tobytes())
    return digest.hexdigest()


# What a chunk says of itself


@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_chunks_follow_each_other(chunk_frames):
    chunks = play(open_session(make_engine(chunk_frames)), 4)
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.start_frame for chunk in chunks] == [chunk_frames * i for i in range(4)]
    assert [chunk.starts_scene for chunk in chunks] == [True, False, False, False]
    assert all(chunk.latents.shape == (1, 16, chunk_frames, 4, 6) for chunk in chunks)
    assert all(bool(chunk.is_finite) for chunk in chunks)


def test_a_chunk_is_not_touched_again():
    session = open_session(make_engine(vae=True), **ENDLESS)
    given = session.start_from(given_latents(2))
    chunks = [given]
    copies = [given.latents.clone()]
    for _ in range(8):
        chunks.append(session.generate_chunk())
        copies.append(chunks[-1].latents.clone())
        session.decode(chunks[-1])
    session.rebuild_cache()
    session.reset()
    for chunk, copy in zip(chunks, copies, strict=True):
        assert torch.equal(chunk.latents, copy)


def test_decoded_pixels_are_those_of_the_whole_latent_sequence():
    engine = make_engine(vae=True)
    session = open_session(engine)
    chunks = play(session, 5)
    pixels = [session.decode(chunk) for chunk in chunks]
    assert [p.shape for p in pixels] == [(1, 3, 1, 32, 48)] + [(1, 3, 4, 32, 48)] * 4
    with torch.inference_mode():
        whole = engine.vae.decode(latents_of(chunks), engine.vae.new_decoder_state(session.config.geometry))
    assert torch.equal(torch.cat(pixels, dim=2), whole)
    assert whole.dtype == torch.float32
    assert float(whole.abs().max()) <= 1


def test_a_session_without_a_prompt_says_so_and_stays():
    session = open_session(make_engine(), prompt=None)
    before = session.snapshot()
    for call in (session.generate_chunk, lambda: session.start_from(given_latents(1))):
        with pytest.raises(SessionStateError) as caught:
            call()
        assert caught.value.reason == "NO_PROMPT"
        assert_same_state(session, before)


def test_decoding_without_a_vae_says_so():
    session = open_session(make_engine())
    with pytest.raises(SessionStateError) as caught:
        session.decode(session.generate_chunk())
    assert caught.value.reason == "NO_VAE"


# Determinism


def test_the_same_seed_gives_the_same_stream_and_another_one_another():
    engine = make_engine()
    first = play(open_session(engine, seed=5), 4)
    assert_same_chunks(play(open_session(make_engine(), seed=5), 4), first)
    other = play(open_session(engine, seed=6), 4)
    for a, b in zip(first, other, strict=True):
        assert float((a.latents - b.latents).abs().max()) > 0.1


def test_the_same_seed_gives_the_same_bits_in_a_new_process():
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()});"
        "from tests.causal_forcing.test_session import fingerprint; print(fingerprint(7))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == fingerprint(7)


def test_the_first_chunk_takes_its_own_steps():
    asked = []

    def noise(chunk, draw, shape):
        asked.append((chunk, draw))
        return SeededNoise(0)(chunk, draw, shape)

    play(open_session(make_engine(), noise=noise), 3)
    expected = [(0, draw) for draw in range(len(FIRST_STEPS))]
    assert asked == expected + [(chunk, draw) for chunk in (1, 2) for draw in range(len(STEPS))]


# Isolation and causality


def test_two_interleaved_sessions_are_each_as_if_alone():
    engine = make_engine(vae=True)
    alone_a = open_session(engine, "a", seed=1, **ENDLESS)
    alone_b = open_session(engine, "b", seed=2, window_frames=4, denoising_steps=(1000,), first_chunk_steps=None)
    script_b = {2: update("c", policy="recache"), 5: update("d", policy="scene_cut")}
    chunks_a, chunks_b = play(alone_a, 8), play(alone_b, 8, script_b)
    pixels_a, pixels_b = [alone_a.decode(c) for c in chunks_a], [alone_b.decode(c) for c in chunks_b]

    a = open_session(engine, "a", seed=1, **ENDLESS)
    b = open_session(engine, "b", seed=2, window_frames=4, denoising_steps=(1000,), first_chunk_steps=None)
    for index in range(8):
        ours_a, ours_b = play(a, index + 1), play(b, index + 1, script_b)
        assert_same_chunks(ours_a, chunks_a[index : index + 1])
        assert_same_chunks(ours_b, chunks_b[index : index + 1])
        assert torch.equal(b.decode(ours_b[0]), pixels_b[index])
        assert torch.equal(a.decode(ours_a[0]), pixels_a[index])


def test_a_session_abandoned_mid_chunk_does_not_disturb_another():
    engine = make_engine()
    expected = play(open_session(engine, seed=3, **ENDLESS), 6)
    ours, other = open_session(engine, seed=3, **ENDLESS), open_session(engine, "z", seed=4, **ENDLESS)
    made = play(ours, 4)
    play(other, 3)
    with pytest.raises(ZeroDivisionError):
        other.generate_chunk(should_stop=lambda: 1 // 0)
    assert_same_chunks(made + play(ours, 6), expected)


@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_what_comes_later_never_changes_what_was_made(chunk_frames):
    engine = make_engine(chunk_frames)

    def other_from_3(chunk, draw, shape):
        return SeededNoise(0 if chunk < 3 else 99)(chunk, draw, shape)

    first = play(open_session(engine, noise=SeededNoise(0)), 5)
    noisy = play(open_session(engine, noise=other_from_3), 5)
    switched = play(open_session(engine, noise=SeededNoise(0)), 5, {3: update("b", policy="recache")})
    for changed in (noisy, switched):
        assert_same_chunks(changed[:3], first[:3])
        assert float((changed[3].latents - first[3].latents).abs().max()) > 1e-3
        assert float((changed[4].latents - first[4].latents).abs().max()) > 1e-3


def test_the_past_matters_as_long_as_it_is_held():
    """A change in chunk 0 shows while it is in the window; a sink keeps it for ever."""
    engine = make_engine()

    def other_first(chunk, draw, shape):
        return SeededNoise(99 if chunk == 0 else 0)(chunk, draw, shape)

    def last_difference(**window):
        a = play(open_session(engine, noise=SeededNoise(0), **window), 3)
        b = play(open_session(engine, noise=other_first, **window), 3)
        return float((a[2].latents - b[2].latents).abs().max())

    assert last_difference(window_frames=6) > 1e-3
    assert last_difference(window_frames=2, sink_frames=1) > 1e-3
    assert last_difference(window_frames=1) == 0


# Reset and snapshot


@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_reset_equals_fresh(chunk_frames):
    engine = make_engine(chunk_frames, vae=True)
    fresh = open_session(engine, **(ENDLESS | {"window_frames": 7}))
    expected = play(fresh, 5)
    pixels = [fresh.decode(chunk) for chunk in expected]

    session = open_session(engine, "old", **(ENDLESS | {"window_frames": 7}), anchor_every_chunks=None)
    for chunk in play(session, 6, {2: update("x", transition_chunks=9), 4: update("y", policy="scene_cut")}):
        session.decode(chunk)
    session.update_prompt(update("waiting"))
    session.reset()
    assert all(float(t.abs().max()) == 0 for t in session.state.decoder.tensors().values())
    assert session.nbytes == open_session(engine, None, **(ENDLESS | {"window_frames": 7})).nbytes
    with pytest.raises(SessionStateError):
        session.generate_chunk()
    session.update_prompt(update("a"))
    again = play(session, 5)
    assert_same_chunks(again, expected)
    assert all(torch.equal(session.decode(c), p) for c, p in zip(again, pixels, strict=True))


def test_shapes_of_the_state_are_constant_once_the_window_is_full():
    session = open_session(make_engine(vae=True), **ENDLESS)
    sizes = []
    for _ in range(12):
        session.decode(session.generate_chunk())
        sizes.append(session.nbytes)
    assert len(set(sizes[5:])) == 1
    parts = session.state.nbytes_by_part()
    assert sum(parts.values()) == session.nbytes
    assert parts["self_attention"] == 2 * 2 * (5 * 6 * 48 + 6 * 48) * 4  # layers, k and v, 5 frames; 2 sink frames, k
    assert parts["cross_attention"] == 2 * 2 * 5 * 48 * 4
    assert parts["latents"] == 5 * 16 * 4 * 6 * 4


# Embeddings


def test_embeddings_that_do_not_fit_are_refused_and_leave_no_trace():
    session = open_session(make_engine())
    play(session, 2)
    before = session.snapshot()
    with pytest.raises(InvalidRequest, match="embeddings: got '2 embeddings'; must be 1, one per prompt"):
        session.update_prompt(update("b"), [embedding("b"), embedding("c")])
    wrong = embedding("b", make_engine().transformer.config)
    object.__setattr__(wrong, "embeds", wrong.embeds[:, :-1])
    with pytest.raises(InvalidRequest, match=r"embeddings: got \(1, 4, 12\); must have shape \(1, 5, 12\)"):
        session.update_prompt(update("b"), [wrong])
    assert_same_state(session, before)


def test_without_a_text_encoder_embeddings_must_be_given():
    engine = make_engine()
    object.__setattr__(engine, "text_encoder", None)
    session = open_session(engine, None)
    with pytest.raises(SessionStateError) as caught:
        session.update_prompt(update("a"))
    assert caught.value.reason == "NO_TEXT_ENCODER"
    session.update_prompt(update("a"), [embedding("a")])
    assert torch.equal(session.generate_chunk().latents, play(open_session(make_engine()), 1)[0].latents)
