"""Going on from a point, latents and prompts equals a rebuild of the session that was lost, bit for bit."""

import pytest

from causal_forcing.errors import SessionStateError
from causal_forcing.resume import AppliedPrompt, StreamPoint, resume_session
from tests.causal_forcing.builders import assert_same_chunks, make_engine, open_session, play, update

SCRIPT = {
    2: update("b", transition_chunks=3, policy="recache"),
    6: update("c", policy="flush"),
    8: update("d", policy="scene_cut"),
    11: update("e", transition_chunks=4, transition="slerp"),
    13: update("f", policy="recache", transition_chunks=3),
}
WINDOWS = {
    "plain": {"window_frames": 6},
    "relative": {"window_frames": 6, "sink_frames": 2},
    "fixed": {"window_frames": 6, "sink_frames": 2, "sink_rope": "fixed"},
    "no window": {"window_frames": None, "max_frames": 48},
}


@pytest.fixture(scope="module")
def engines():
    return {frames: make_engine(frames) for frames in (1, 3)}


class Witness:
    """Sees a session's chunks, as a gateway does, and keeps what it needs."""

    def __init__(self, session):
        self.session, self.latents, self.prompts = session, {}, []

    def append(self, chunk, current):
        if chunk.prompt_applied:
            embeddings = self.session.engine.encode_prompts(current)
            self.prompts.append(AppliedPrompt(chunk.index, current, embeddings))
        self.latents[chunk.start_frame] = chunk.latents.clone()
        self.point = StreamPoint.of(self.session.state)
        held = {frame for some in self.point.held_ranges(self.session.config) for frame in some}
        assert held == set(self.session.state.cache.held_positions())
        self.latents = {s: x for s, x in self.latents.items() if held & set(range(s, s + x.shape[2]))}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("chunk_frames", "stops"), [(1, (1, 4, 7, 9, 12, 14)), (3, (9, 14))])
def test_a_resumed_session_equals_a_rebuild_of_the_one_that_was_lost(engines, chunk_frames, window, stops):
    for stop in stops:
        session = open_session(engines[chunk_frames], **WINDOWS[window])
        witness = Witness(session)
        play(session, stop, SCRIPT, witness)
        chain = witness.prompts[-3:]
        resumed = resume_session(session.engine, session.config, witness.point, witness.latents, chain)
        session.rebuild_cache()
        later = {chunk: change for chunk, change in SCRIPT.items() if chunk >= stop}
        made = play(resumed, stop + 4, later)
        assert made[0].after_rebuild
        assert_same_chunks(made, play(session, stop + 4, later))


def test_the_chain_of_a_transition_decides_the_embedding(engines):
    session = open_session(engines[1])
    witness = Witness(session)
    play(session, 4, SCRIPT, witness)  # in the middle of the transition from "a" to "b"
    whole = resume_session(session.engine, session.config, witness.point, witness.latents, witness.prompts)
    assert whole.state.prompt.embeds.equal(session.state.prompt.embeds)
    cut = resume_session(session.engine, session.config, witness.point, witness.latents, witness.prompts[-1:])
    assert not cut.state.prompt.embeds.equal(session.state.prompt.embeds)


def test_missing_latents_are_an_error(engines):
    session = open_session(engines[1])
    witness = Witness(session)
    play(session, 4, None, witness)
    witness.latents.pop(2)
    with pytest.raises(SessionStateError) as caught:
        resume_session(session.engine, session.config, witness.point, witness.latents, witness.prompts)
    assert caught.value.reason == "NOT_EXACT"
