"""Streams have no last position: nothing changes however far they have run."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from causal_forcing.cursor import CacheCursor
from tests.causal_forcing.builders import (
    ENDLESS,
    TRANSFORMER,
    latents_of,
    make_engine,
    open_session,
    play,
)


class CountOps(TorchDispatchMode):
    """Counts what is dispatched while it is active, by operator."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def start_at(session, position):
    """Let a fresh session begin at a later position of the stream."""
    sink = session.config.sink_frames
    session.state.cache.cursor = CacheCursor(origin=position, ring_start=position + sink, end=position)
    return session


@pytest.mark.parametrize(
    ("chunk_frames", "window"),
    [
        (1, {"window_frames": 4}),
        (1, ENDLESS),
        (3, {"window_frames": 7, "sink_frames": 1}),
        (1, ENDLESS | {"sink_rope": "fixed"}),
    ],
    ids=["no-sink", "relative", "chunks", "fixed"],
)
def test_a_stream_is_the_same_at_any_position(chunk_frames, window):
    engine = make_engine(chunk_frames)
    near = play(open_session(engine, **window), 9)
    for position in (1_020, 100_000, 2_000_000):
        far = play(start_at(open_session(engine, **window), position), 9)
        assert [chunk.start_frame for chunk in far] == [chunk.start_frame + position for chunk in near]
        torch.testing.assert_close(latents_of(far), latents_of(near), atol=1e-4, rtol=0)


def test_nothing_special_happens_at_frame_1024_or_anywhere_else():
    engine = make_engine()
    for window in ({"window_frames": 4}, ENDLESS):
        counts = []
        for position in (0, 1_017, 1_000_000):
            session = start_at(open_session(engine, **window), position)
            play(session, 6)  # the window is full
            for _ in range(4):
                with CountOps() as ops:
                    session.generate_chunk()
                counts.append(ops.counts)
        assert counts[0].total() > 100
        assert all(count == counts[0] for count in counts)


def test_it_really_runs_on_past_frame_1024():
    """Not moved there but generated, chunk by chunk, one step each."""
    engine = make_engine(config=replace(TRANSFORMER, num_layers=1))
    config = {"height": 16, "width": 16, "denoising_steps": (1000,), "first_chunk_steps": None, "window_frames": 3}
    chunks = play(open_session(engine, **config), 1_030)
    assert chunks[-1].start_frame == 1_029
    assert bool(torch.stack([chunk.is_finite for chunk in chunks]).all())
    late = latents_of(chunks[1_000:])
    assert 0.5 < float(late.std() / latents_of(chunks[:30]).std()) < 2  # the level has not drifted
