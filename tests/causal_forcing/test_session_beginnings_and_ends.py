"""Streams that begin with given frames, and streams that end because they have no window."""

import pytest
import torch

from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.noise import SeededNoise
from tests.causal_forcing.builders import (
    assert_same_chunks,
    assert_same_state,
    given_latents,
    latents_of,
    make_engine,
    open_session,
    play,
    update,
)


@pytest.mark.parametrize(("chunk_frames", "frames"), [(1, 1), (1, 9), (3, 1), (3, 3), (3, 7)])
def test_given_frames_are_chunk_zero(chunk_frames, frames):
    session = open_session(make_engine(chunk_frames, vae=True), window_frames=7)
    latents = given_latents(frames)
    chunk = session.start_from(latents)
    assert (chunk.index, chunk.start_frame, chunk.starts_scene) == (0, 0, True)
    assert (chunk.prompt_id, chunk.prompt_applied) == ("a", True)
    assert torch.equal(chunk.latents, latents)
    assert session.decode(chunk).shape == (1, 3, 1 + 4 * (frames - 1), 32, 48)
    following = session.generate_chunk()
    assert (following.index, following.start_frame, following.starts_scene) == (1, frames, False)
    assert not following.prompt_applied
    assert session.decode(following).shape == (1, 3, 4 * chunk_frames, 32, 48)


def test_the_first_generated_chunk_after_given_frames_takes_the_first_steps():
    asked = []

    def noise(chunk, draw, shape):
        asked.append((chunk, draw))
        return SeededNoise(0)(chunk, draw, shape)

    session = open_session(make_engine(), noise=noise)
    session.start_from(given_latents(2))
    play(session, 3)
    assert asked == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


def test_generated_frames_given_to_another_session_continue_alike():
    """Writing latents as context is what generating them did last."""
    engine = make_engine()
    chunks = play(open_session(engine, first_chunk_steps=None), 5)
    session = open_session(engine, first_chunk_steps=None, noise=lambda chunk, *rest: SeededNoise(42)(chunk + 3, *rest))
    session.start_from(latents_of(chunks[:4]))
    assert torch.equal(session.generate_chunk().latents, chunks[4].latents)


@pytest.mark.parametrize(
    "shape", [(16, 1, 4, 6), (1, 16, 0, 4, 6), (2, 16, 1, 4, 6), (1, 4, 1, 4, 6), (1, 16, 1, 6, 4), (1, 1, 16, 4, 6)]
)
def test_given_latents_of_another_shape_are_refused(shape):
    session = open_session(make_engine())
    before = session.snapshot()
    with pytest.raises(InvalidRequest) as caught:
        session.start_from(torch.zeros(shape))
    expected = f"latents: got {list(shape)}; must be [1, 16, 1, 4, 6], with 1 or more frames"
    assert str(caught.value) == expected
    assert_same_state(session, before)


def test_more_given_frames_than_a_session_without_a_window_holds_are_refused():
    session = open_session(make_engine(), window_frames=None, max_frames=5)
    with pytest.raises(InvalidRequest, match="latents: got '5 frames'; must be at most 4 without a window"):
        session.start_from(given_latents(5))
    session.start_from(given_latents(4))
    session.generate_chunk()


def test_given_frames_after_the_first_chunk_are_refused():
    for first in (lambda s: s.generate_chunk(), lambda s: s.start_from(given_latents(1))):
        session = open_session(make_engine())
        first(session)
        before = session.snapshot()
        with pytest.raises(SessionStateError) as caught:
            session.start_from(given_latents(1))
        assert caught.value.reason == "ALREADY_STARTED"
        assert_same_state(session, before)


# Without a window


def test_a_stream_without_a_window_ends_when_it_is_full():
    session = open_session(make_engine(3), window_frames=None, max_frames=10)
    chunks = play(session, 3)
    before = session.snapshot()
    for _ in range(2):
        with pytest.raises(SessionStateError, match="set window_frames for an endless stream") as caught:
            session.generate_chunk()
        assert caught.value.reason == "STREAM_FULL"
        assert session.state.position == 9
    before.meta["prompt"]["chunk"] = 3  # the boundary was crossed; all else is as it was
    assert_same_state(session, before)
    assert_same_chunks(play(open_session(make_engine(3), window_frames=10), 3), chunks)


@pytest.mark.parametrize("tried", [False, True])
def test_a_scene_cut_makes_room_in_a_full_stream(tried):
    session = open_session(make_engine(), window_frames=None, max_frames=3)
    play(session, 3)
    if tried:
        session.update_prompt(update("b"))
        with pytest.raises(SessionStateError):
            session.generate_chunk()
    session.update_prompt(update("c", policy="scene_cut"))
    chunk = session.generate_chunk()
    assert (chunk.starts_scene, chunk.start_frame, chunk.prompt_id) == (True, 3, "c")
    assert len(play(session, 6)) == 2
