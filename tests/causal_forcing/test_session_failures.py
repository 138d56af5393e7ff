"""A chunk is committed, or can be tried again with the same result, or the session has failed for good."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from causal_forcing.errors import DeviceFault, NonFiniteOutput, OutOfMemory, SessionStateError
from causal_forcing.noise import SeededNoise
from causal_forcing.sampler import Stopped
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

WRAPPING = {"window_frames": 7, "sink_frames": 1}


class FailAt(TorchDispatchMode):
    """Raises instead of the ``number``-th operation (None: only counts)."""

    def __init__(self, number, error):
        super().__init__()
        self.number, self.error, self.count = number, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.number:
            raise self.error
        return func(*args, **(kwargs or {}))


def prepare(chunk_frames, config, chunks, change):
    session = open_session(make_engine(chunk_frames), **config)
    play(session, chunks, {1: update("b", transition_chunks=9)} if chunks > 1 else None)
    if change is not None:
        session.update_prompt(change)
    return session


SITUATIONS = {
    "first chunk": lambda: prepare(1, ENDLESS, 0, None),
    "window full": lambda: prepare(1, ENDLESS, 7, None),
    "fixed sink": lambda: prepare(1, ENDLESS | {"sink_rope": "fixed"}, 7, None),
    "wrapping around": lambda: prepare(3, WRAPPING, 5, None),
    "no window": lambda: prepare(3, {"window_frames": None, "max_frames": 20}, 2, None),
    "switch": lambda: prepare(1, ENDLESS, 7, update("c")),
    "recache": lambda: prepare(1, ENDLESS, 7, update("c", policy="recache")),
    "recache of chunks": lambda: prepare(3, WRAPPING, 5, update("c", policy="recache")),
    "anchor": lambda: prepare(1, ENDLESS | {"anchor_every_chunks": 7}, 7, None),
    "anchor and recache": lambda: prepare(3, WRAPPING | {"anchor_every_chunks": 5}, 5, update("c", policy="recache")),
    "scene cut": lambda: prepare(1, ENDLESS, 7, update("c", policy="scene_cut")),
    "flush": lambda: prepare(1, ENDLESS, 7, update("c", policy="flush")),
}


def spread(total, count=12):
    """Return some of ``range(total)``: the ends, and evenly between."""
    return sorted({round(i * (total - 1) / (count - 1)) for i in range(count)} | {0, 1, total - 2, total - 1})


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_chunk_stopped_before_any_step_can_be_tried_again(situation):
    session = SITUATIONS[situation]()
    start = session.snapshot()
    index = session.state.chunk_index
    expected = play(session, index + 3)
    for stop_at in range(3 if index == 0 else 2):
        session.restore(start)
        for _ in range(2):
            asked = iter(range(9))
            with pytest.raises(Stopped):
                session.generate_chunk(should_stop=lambda asked=asked, at=stop_at: next(asked) == at)
            assert session.state.position == expected[0].start_frame
        assert_same_chunks(play(session, index + 3), expected)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_chunk_that_breaks_off_at_any_operation_can_be_tried_again(situation):
    session = SITUATIONS[situation]()
    start = session.snapshot()
    index = session.state.chunk_index
    with FailAt(None, None) as counter:
        expected = play(session, index + 1)
    expected += play(session, index + 2)
    failed = 0
    for number in spread(counter.count):
        session.restore(start)
        with pytest.raises(RuntimeError, match="planted"), FailAt(number, RuntimeError("planted")):
            session.generate_chunk()
        if session.state.failed:
            failed += 1
            with pytest.raises(SessionStateError, match="a flush broke off half-way"):
                session.generate_chunk()
            continue
        assert session.state.position == expected[0].start_frame
        assert_same_chunks(play(session, index + 2), expected)
    assert bool(failed) == (situation == "flush")


def test_given_frames_that_break_off_can_be_given_again():
    latents = given_latents(7)
    engine = make_engine(3)
    undisturbed = open_session(engine, **WRAPPING)
    with FailAt(None, None) as counter:
        expected = [undisturbed.start_from(latents)]
    expected += play(undisturbed, 3)
    for number in spread(counter.count):
        session = open_session(engine, **WRAPPING)
        with pytest.raises(RuntimeError, match="planted"), FailAt(number, RuntimeError("planted")):
            session.start_from(latents)
        assert_same_chunks([session.start_from(latents), *play(session, 3)], expected)


def test_a_rebuild_that_breaks_off_is_made_up_for_before_the_next_chunk():
    engine = make_engine()
    undisturbed = open_session(engine, **ENDLESS)
    play(undisturbed, 7)
    undisturbed.rebuild_cache()
    expected = play(undisturbed, 9)
    session = open_session(engine, **ENDLESS)
    play(session, 7)
    with pytest.raises(RuntimeError, match="planted"), FailAt(100, RuntimeError("planted")):
        session.rebuild_cache()
    other = open_session(engine, None, **ENDLESS)
    other.restore(session.snapshot())  # the debt is part of the state
    assert_same_chunks(play(session, 9), expected)
    assert_same_chunks(play(other, 9), expected)


def test_an_error_of_the_callers_own_is_passed_on_and_nothing_is_lost():
    session = open_session(make_engine(), **ENDLESS)
    expected = play(open_session(make_engine(), **ENDLESS), 6)
    made = play(session, 4)
    with pytest.raises(KeyboardInterrupt):
        session.generate_chunk(should_stop=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert_same_chunks(made + play(session, 6), expected)


# Errors that end a session


@pytest.mark.parametrize(
    ("planted", "raised", "reason"),
    [
        (torch.OutOfMemoryError("40 GiB wanted"), OutOfMemory, "OUT_OF_MEMORY"),
        (torch.AcceleratorError("an illegal memory access"), DeviceFault, "DEVICE_FAULT"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceFault, "DEVICE_FAULT"),
    ],
)
@pytest.mark.parametrize("number", [3, 150])
def test_device_errors_fail_the_session_for_good(planted, raised, reason, number):
    engine = make_engine(vae=True)
    session = open_session(engine, **ENDLESS)
    chunk = play(session, 4)[-1]
    good = session.snapshot()
    with pytest.raises(raised, match=str(planted)) as caught, FailAt(number, planted):
        session.generate_chunk()
    assert caught.value.reason == reason
    assert caught.value.__cause__ is planted
    for call in (session.generate_chunk, session.snapshot, session.rebuild_cache, lambda: session.decode(chunk)):
        with pytest.raises(SessionStateError) as refused:
            call()
        assert refused.value.reason == "SESSION_FAILED"
    other = open_session(engine, **ENDLESS)
    assert_same_chunks(play(other, 6), play(open_session(engine, **ENDLESS), 6))  # the engine is not to blame
    expected = play(other, 8)
    session.restore(good)
    assert_same_chunks(play(session, 8)[2:], expected)


def test_a_reset_revives_a_failed_session():
    session = open_session(make_engine(), **ENDLESS)
    play(session, 3)
    with pytest.raises(OutOfMemory), FailAt(50, torch.OutOfMemoryError("no")):
        session.generate_chunk()
    session.reset()
    session.update_prompt(update("a"))
    assert_same_chunks(play(session, 5), play(open_session(make_engine(), **ENDLESS), 5))


def test_out_of_memory_while_decoding_fails_the_session():
    session = open_session(make_engine(vae=True))
    chunk = session.generate_chunk()
    with pytest.raises(OutOfMemory), FailAt(5, torch.OutOfMemoryError("no")):
        session.decode(chunk)
    with pytest.raises(SessionStateError) as caught:
        session.generate_chunk()
    assert caught.value.reason == "SESSION_FAILED"


def test_a_decoder_that_breaks_off_says_so_until_it_is_restored():
    session = open_session(make_engine(vae=True))
    for chunk in play(session, 2):
        session.decode(chunk)
    good, chunk = session.snapshot(), session.generate_chunk()
    with pytest.raises(RuntimeError, match="planted"), FailAt(5, RuntimeError("planted")):
        session.decode(chunk)
    with pytest.raises(SessionStateError) as caught:
        session.decode(chunk)
    assert caught.value.reason == "DECODER_STATE_FAILED"
    session.restore(good)
    again = session.generate_chunk()
    assert torch.equal(again.latents, chunk.latents)
    reference = open_session(make_engine(vae=True))
    expected = [reference.decode(c) for c in play(reference, 3)]
    assert torch.equal(session.decode(again), expected[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_found_at_decode_and_fails_the_session(value):
    def noise(chunk, draw, shape):
        drawn = SeededNoise(0)(chunk, draw, shape)
        if chunk == 2 and draw == 1:
            drawn[0, 3, 0, 1, 2] = value
        return drawn

    session = open_session(make_engine(vae=True), noise=noise)
    chunks = play(session, 3)
    assert [bool(chunk.is_finite) for chunk in chunks] == [True, True, False]
    session.decode(chunks[0])
    session.decode(chunks[1])
    with pytest.raises(NonFiniteOutput, match="chunk 2 holds NaN or infinity") as caught:
        session.decode(chunks[2])
    assert (caught.value.reason, caught.value.metadata) == ("NON_FINITE_OUTPUT", {"chunk": "2"})
    with pytest.raises(SessionStateError) as refused:
        session.generate_chunk()
    assert refused.value.reason == "SESSION_FAILED"


def test_weights_that_are_not_finite_are_found_too():
    engine = make_engine(vae=True)
    engine.transformer.head.head.bias[0] = float("nan")
    session = open_session(engine)
    with pytest.raises(NonFiniteOutput):
        session.decode(session.generate_chunk())


def test_refused_calls_change_nothing():
    session = open_session(make_engine(vae=True), **ENDLESS)
    play(session, 3)
    before = session.snapshot()
    for call in (
        lambda: session.start_from(given_latents(1)),
        lambda: session.update_prompt(update("b"), []),
        lambda: update("b", policy="melt"),
        lambda: open_session(session.engine, window_frames=2, sink_frames=2),
    ):
        with pytest.raises(Exception, match="."):
            call()
        assert_same_state(session, before)
