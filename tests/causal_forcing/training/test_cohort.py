"""A cohort's members are the sessions that they stand for, and an evaluation does not depend on how it is cut up."""

import numpy as np
import pytest
import torch

from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest
from causal_forcing.media import to_frames
from causal_forcing.presets import get_preset
from causal_forcing.prompts import PromptUpdate, SwitchPolicy, WeightedPrompt
from causal_forcing.training import cohort, evaluation, showcase

PROMPTS = ("a red circle moving left on black", "a blue ring", "two green things")


@pytest.fixture(scope="module")
def engine():
    return Engine.load("tiny")


@pytest.mark.parametrize("policy", list(SwitchPolicy))
def test_members_equal_sessions_of_their_own(engine, policy):
    config = engine.session_config(window_frames=4, sink_frames=1, denoising_steps=(1000, 500))
    together = cohort.Cohort(engine, config, (5, 6, 7))
    together.update_prompt(PROMPTS)
    chunks = list(together.latents(5))
    together.update_prompt(PROMPTS[::-1], policy=policy)
    latents = torch.cat([*chunks, *together.latents(3)], dim=2)
    for index, seed in enumerate((5, 6, 7)):
        alone = engine.new_session(
            engine.session_config(window_frames=4, sink_frames=1, denoising_steps=(1000, 500), seed=seed)
        )
        parts = []
        for count, prompt, how in ((5, PROMPTS[index], SwitchPolicy.CROSS_ATTENTION), (3, PROMPTS[-1 - index], policy)):
            alone.update_prompt(PromptUpdate((WeightedPrompt(prompt),), policy=how))
            parts += [alone.generate_chunk().latents for _ in range(count)]
        torch.testing.assert_close(latents[index : index + 1], torch.cat(parts, dim=2), atol=1e-4, rtol=0)


def test_clips_are_decoded_as_a_stream_is(engine):
    together = cohort.Cohort(engine, engine.session_config(), (1, 2))
    together.update_prompt(PROMPTS[:2])
    latents = torch.cat(list(together.latents(3)), dim=2)
    for clip, own in zip(cohort.decode(engine, latents), latents.split(1), strict=True):
        assert engine.vae is not None
        streamed = to_frames(engine.vae.decode(own, engine.vae.new_decoder_state(engine.session_config().geometry)))
        assert np.abs(clip.astype(int) - streamed).max() <= 1


def test_an_evaluation_in_parts_is_the_whole(engine, monkeypatch):
    monkeypatch.setattr(evaluation, "CLIP_LATENTS", 9)
    questions = evaluation.held_out_questions(4)
    whole = evaluation.Evaluator(engine, {"denoising_steps": (1000,)}).follow(questions)
    parts = [
        evaluation.Evaluator(engine, {"denoising_steps": (1000,)}, together=1, first=first).follow(
            questions[first:last]
        )
        for first, last in ((0, 1), (1, 4))
    ]
    for name, value in whole["attributes"].items():
        found = [part["attributes"][name] for part in parts if name in part["attributes"]]
        assert sum(round(part["accuracy"] * part["count"]) for part in found) == round(
            value["accuracy"] * value["count"]
        )
    assert whole["flicker"] == pytest.approx((parts[0]["flicker"] + 3 * parts[1]["flicker"]) / 4, rel=1e-3)


def test_other_autoencoders_are_refused(engine):
    other = Engine(get_preset("tiny"), engine.transformer, vae=None, text_encoder=engine.text_encoder)
    with pytest.raises(InvalidRequest, match="Wan family"):
        cohort.decode(other, torch.zeros(1, 16, 1, 8, 8))


def test_the_showcase_leaves_no_stream_out(engine, monkeypatch):
    monkeypatch.setattr(showcase, "LATENTS", 1)
    clips = showcase.stream(engine, showcase.STORIES[:5])
    assert [clip.shape for clip in clips] == [(5, 64, 64, 3)] * 5
    assert showcase.contact_sheet(clips, showcase.STORIES[:5]).size == (12 * 64, 5 * (64 + showcase.LINE))
    wall = showcase.wall(clips[:4], columns=2)
    assert np.array_equal(wall[:, 64:, :64], clips[2])


def test_with_one_step_the_ode_is_the_sampler(engine):
    config = engine.session_config(denoising_steps=(1000,))
    found = []
    for euler in (False, True):
        together = cohort.Cohort(engine, config, (1,), euler=euler)
        together.update_prompt(PROMPTS[:1])
        found.append(torch.cat(list(together.latents(3)), dim=2))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_the_ode_draws_no_noise_after_the_first(engine):
    draws = []

    class Counting(cohort.CohortNoise):
        def __call__(self, chunk, draw, shape):
            draws.append(draw)
            return super().__call__(chunk, draw, shape)

    session = cohort.EulerSession(engine, engine.session_config(denoising_steps=(1000, 500)), noise=Counting((1,)))
    session.update_prompt(PromptUpdate((WeightedPrompt(PROMPTS[0]),)))
    session.generate_chunk()
    assert draws == [0]
