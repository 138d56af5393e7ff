"""What a gateway keeps of a session is enough to go on with it, and no more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from causal_forcing.cursor import CacheCursor
from causal_forcing.prompts import PromptUpdate
from causal_forcing.resume import StreamPoint
from serve.config import load_config
from serve.gateway.memory import MAX_PROMPTS, SessionMemory
from serve.messages import GeneratedChunk, PackedEmbedding, PackedTensor
from serve.model_engines import ModelGenerator
from tests.serve.fakes import chunk, embedding, latents, simulated, update


def memory(reach_frames: int = 3, **config: Any) -> SessionMemory:
    fields = {"window_frames": 2, "sink_frames": 0, **config}
    return SessionMemory(simulated().model_preset.session_config(**fields), reach_frames)


def values(some: PackedTensor | None) -> list[int]:
    return [] if some is None else [int(value) for value in some.data[0, 0, :, 0, 0]]


def held(kept: SessionMemory) -> list[int]:
    resume = kept.resume()
    return [] if resume is None else [value for _, some in resume.latents for value in values(some)]


def test_a_decoder_gets_the_frames_before_the_chunk_and_a_generator_those_of_its_window() -> None:
    kept = memory()
    for index in range(8):
        kept.commit(chunk(index))
    assert values(kept.before(chunk(7))) == [4, 5, 6]
    assert held(kept) == [6, 7]
    assert kept.nbytes == 4 * chunk(0).latents.nbytes
    assert kept.next_chunk == 8


def test_the_sink_is_kept_however_long_ago_it_was() -> None:
    kept = memory(sink_frames=1)
    for index in range(20):
        kept.commit(chunk(index))
    assert held(kept) == [0, 19]


def test_a_new_scene_forgets_the_one_before() -> None:
    kept = memory()
    for index in range(5):
        kept.commit(chunk(index))
    cut = replace(chunk(5), point=StreamPoint(6, 1, CacheCursor(5, 5, 6)), starts_scene=True)
    kept.commit(cut)
    assert kept.before(cut) is None
    assert held(kept) == [5]
    later = replace(chunk(6), point=StreamPoint(7, 2, CacheCursor(5, 5, 7)))
    kept.commit(later)
    assert values(kept.before(later)) == [5]


def test_it_does_not_hold_on_to_what_it_was_given() -> None:
    given = latents([1])
    kept = memory()
    kept.commit(replace(chunk(0), latents=given))
    given.data[:] = 7
    assert held(kept) == [1]


def test_prompts_are_kept_while_the_transition_comes_from_them() -> None:
    kept = memory()
    kept.show(0, update("a"), (embedding("a"),))
    kept.commit(chunk(0))
    kept.show(1, update("b", transition_chunks=3), (embedding("b"),))
    names = []
    for index in range(1, 5):
        kept.commit(chunk(index))
        resume = kept.resume()
        assert resume is not None
        names.append([shown.embeddings[0].key for shown in resume.prompts])
    assert names == [["a", "b"], ["a", "b"], ["b"], ["b"]]


def test_a_chain_of_broken_transitions_is_bounded() -> None:
    kept = memory()
    for index in range(20):
        kept.show(index, update(str(index), transition_chunks=9), (embedding(str(index)),))
        kept.commit(chunk(index))
    resume = kept.resume()
    assert resume is not None
    assert [shown.chunk for shown in resume.prompts] == list(range(20 - MAX_PROMPTS, 20))


def test_nothing_comes_of_nothing() -> None:
    assert memory().resume() is None


@pytest.mark.slow
def test_the_embedded_model_goes_on_from_it_as_after_a_rebuild() -> None:
    config = load_config(None, sizes=[[32, 32]])
    generator = ModelGenerator(config)
    session_config = config.model_preset.session_config(height=32, width=32, seed=3, window_frames=4)
    kept = SessionMemory(session_config)
    sizes = config.model_preset.transformer

    def embedded(name: str) -> PackedEmbedding:
        numbers = np.random.default_rng(len(name)).standard_normal((1, sizes.text_len, sizes.text_dim))
        return PackedEmbedding(name, PackedTensor(numbers.astype(np.float32), "float32"))

    session = generator.open(session_config)

    def make(prompt: tuple[PromptUpdate, PackedEmbedding] | None = None) -> GeneratedChunk:
        if prompt is not None:
            session.update_prompt(prompt[0], [prompt[1]])
        made = session.generate(lambda: False)
        assert made is not None
        if prompt is not None:
            kept.show(made.index, prompt[0], (prompt[1],))
        kept.commit(made)
        return made

    make((update("a"), embedded("a")))
    make((update("bb", transition_chunks=8), embedded("bb")))
    for _ in range(4):
        make()
    resume = kept.resume()
    assert resume is not None
    moved = ThreadPoolExecutor(1).submit(generator.resume, session_config, resume).result()
    session._session.rebuild_cache()  # type: ignore[attr-defined]
    for _ in range(3):
        ours, theirs = moved.generate(lambda: False), session.generate(lambda: False)
        assert ours is not None
        assert theirs is not None
        assert (ours.index, ours.point, ours.prompt_id) == (theirs.index, theirs.point, theirs.prompt_id)
        assert not ours.prompt_applied
        assert np.array_equal(ours.latents.data, theirs.latents.data)
