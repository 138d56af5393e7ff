"""Every training stage at toy size: loss falls, checkpoints resume bit for bit, the result loads and is evaluated."""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from causal_forcing.commands import evaluate
from causal_forcing.config import TextEncoderConfig, TransformerConfig, VaeConfig
from causal_forcing.engine import Engine
from causal_forcing.presets import get_preset
from causal_forcing.tokenizer import END_ID, PAD_ID, FileTokenizer
from causal_forcing.training import (
    ar,
    captions,
    cd,
    cohort,
    evaluation,
    export,
    generated,
    guided,
    latents,
    lightvae,
    model,
    shipped,
    streams,
    teacher_forcing,
    vae,
    world,
    worn,
)
from causal_forcing.training.loop import CPU, Device, Run, Schedule, add_arguments, read_log, step_rng
from causal_forcing.training.optimizer import Optimizer, orthogonalise
from causal_forcing.training.text import train_tokenizer

VAE = VaeConfig(base_dim=4, num_res_blocks=1)
LIGHT = VaeConfig(base_dim=1, num_res_blocks=1)
VOCABULARY = 300
PRESET = dataclasses.replace(
    get_preset("tiny"),
    transformer=TransformerConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=16, text_len=64),
    text_encoder=TextEncoderConfig(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=1, text_len=64
    ),
)
SCHEDULE = Schedule(steps=4, learning_rate=5e-3, warmup=2, save_every=2)
UNSEEN = 1000
"""A step whose batch no run has trained on."""


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "CROPPED_CLIPS", 2)
        patch.setattr(vae, "WHOLE_CLIPS", 2)
        patch.setattr(vae, "CROP", 16)
        patch.setattr(vae, "SHORT_FRAMES", 5)
        patch.setattr(vae, "LONG_FRAMES", 5)
        patch.setattr(latents, "SHARD_FRAMES", 20)
        patch.setattr(latents, "CLIP_FRAMES", 5)
        patch.setattr(latents, "SWITCH_SHARE", 0.5)
        patch.setattr(model, "CONFIG", VAE)
        patch.setattr(model, "LIGHT_CONFIG", LIGHT)
        patch.setattr(evaluation, "CLIP_LATENTS", 3)
        patch.setattr(evaluation, "SWITCH_AFTER", 2)
        patch.setattr(evaluation, "SWITCH_WATCH", 2)
        patch.setattr(ar, "CLIPS", 2)
        patch.setattr(ar, "BEGINNINGS", 2)
        patch.setattr(ar, "WINDOW_FRAMES", 3)
        for stage in (ar, cd):
            patch.setattr(stage, "DRAWS", 2)
        yield


@pytest.fixture(scope="module")
def root(small, tmp_path_factory):
    """A training folder with a tokenizer, a VAE of a few steps, and latents made with it."""
    folder = tmp_path_factory.mktemp("training")
    train_tokenizer(folder / "text" / "tokenizer.json", VOCABULARY, count=200)
    vae.train(folder, config=VAE, schedule=SCHEDULE)
    latents.build(folder, clips=8, beginnings=20, two_objects=0.0, config=VAE)
    return folder


def branch(root, tmp_path):
    """A folder that shares the inputs of ``root`` and has no generator yet."""
    for name in ("vae", "latents", "beginnings", "text"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


def tensors(folder):
    return load_file(folder / "last.safetensors")


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def stages(root):
    return {
        "vae": lambda folder, until: vae.train(folder, config=VAE, schedule=SCHEDULE, until=until),
        "lightvae": lambda folder, until: lightvae.train(
            folder, config=LIGHT, large_config=VAE, schedule=SCHEDULE, until=until
        ),
        "ar": lambda folder, until: ar.train(folder, preset=PRESET, schedule=SCHEDULE, until=until),
        "bidirectional": lambda folder, until: ar.train(
            folder, preset=PRESET, schedule=SCHEDULE, until=until, stage="bidirectional"
        ),
        "first-frames": lambda folder, until: ar.train(
            folder, preset=PRESET, schedule=SCHEDULE, until=until, stage="first-frames"
        ),
        "guided": lambda folder, until: guided.train(folder, preset=PRESET, schedule=SCHEDULE, until=until),
        "cd": lambda folder, until: cd.train(folder, preset=PRESET, schedule=SCHEDULE, until=until),
        "cd-bidirectional": lambda folder, until: cd.train(
            folder, preset=PRESET, schedule=SCHEDULE, until=until, teacher_stage="bidirectional"
        ),
    }


EARLIER = {"first-frames": ["ar"], "guided": ["ar"], "cd": ["ar", "guided"], "cd-bidirectional": ["bidirectional"]}


@pytest.mark.parametrize(
    "stage", ["vae", "lightvae", "ar", "bidirectional", "first-frames", "guided", "cd", "cd-bidirectional"]
)
def test_a_stage_resumes_bit_for_bit(root, tmp_path, stage):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        if stage != "vae":
            branch(root, folder)
        for earlier in EARLIER.get(stage, []):
            stages(root)[earlier](folder, 2)
    train = stages(root)[stage]
    train(whole, None)
    train(broken, 2)
    train(broken, None)
    assert_same(tensors(whole / stage), tensors(broken / stage))
    assert [r["loss"] for r in read_log(whole / stage)] == [r["loss"] for r in read_log(broken / stage)]
    assert len(read_log(whole / stage)) == SCHEDULE.steps


def test_the_vae_learns(tmp_path):
    def loss(parameters):
        random = step_rng(1, UNSEEN)
        with torch.no_grad():
            return float(vae.objective(parameters, VAE, vae.batch(0, 0.0, random.numpy), random)["loss"])

    long = dataclasses.replace(SCHEDULE, steps=12, learning_rate=1e-2)
    before = vae.train(tmp_path, config=VAE, schedule=long, until=0).parameters
    start = loss(before)
    assert loss(vae.train(tmp_path, config=VAE, schedule=long).parameters) < 0.8 * start


def test_the_light_vae_learns_the_latents_of_the_large_one(root, tmp_path):
    branch(root, tmp_path)
    long = dataclasses.replace(SCHEDULE, steps=12, learning_rate=1e-2)
    large = load_file(root / "vae" / "ema.safetensors")

    def loss(parameters):
        random = step_rng(1, UNSEEN)
        video = vae.batch(0, 0.0, random.numpy)
        with torch.no_grad():
            return float(lightvae.objective(large, parameters, (VAE, LIGHT), video, random)["loss"])

    def run(until):
        return lightvae.train(tmp_path, config=LIGHT, large_config=VAE, schedule=long, until=until)

    start = loss(run(0).parameters)
    assert loss(run(None).parameters) < 0.9 * start


def test_the_small_decoder_is_held_to_colours_more_than_to_greys():
    video = torch.zeros(1, 3, 1, 4, 4)
    grey = torch.full_like(video, 0.1)
    coloured = grey * torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1, 1) * 1.5**0.5
    plain, tinted = (lightvae.drawing_error(off, video) for off in (grey, coloured))
    assert plain["mse"].item() == pytest.approx(tinted["mse"].item())
    assert plain["chroma"].item() == pytest.approx(0, abs=1e-12)
    assert tinted["chroma"].item() == pytest.approx(0.01)
    assert tinted["loss"] > 3 * plain["loss"]


@pytest.mark.parametrize("stage", ["ar", "bidirectional"])
def test_the_generator_learns(root, tmp_path, stage):
    branch(root, tmp_path)
    long = dataclasses.replace(SCHEDULE, steps=16, learning_rate=1e-2)
    generator = model.new_generator(tmp_path, 4, PRESET)
    data = ar.load_data(tmp_path, generator, CPU)

    def loss(run):
        generator.load(run.parameters)
        layout = data.layout(2, bidirectional=stage == "bidirectional")
        with torch.no_grad():
            return float(ar.objective(generator, data, layout, step_rng(1, UNSEEN))["loss"])

    start = loss(ar.train(tmp_path, preset=PRESET, schedule=long, until=0, stage=stage))
    assert loss(ar.train(tmp_path, preset=PRESET, schedule=long, stage=stage)) < 0.95 * start


def empty_captions(ids):
    """Return token ids of empty captions: the end, then padding."""
    empty = torch.full_like(ids, PAD_ID)
    empty[:, 0] = END_ID
    return empty


def test_first_frames_are_learnt_by_themselves_under_the_caption_that_they_begin_with(root, tmp_path):
    branch(root, tmp_path)
    generator = model.new_generator(tmp_path, 4, PRESET)
    data = dataclasses.replace(ar.load_data(tmp_path, generator, CPU), beginnings=6)
    batch = data.first_frames(step_rng(1, 0))
    assert torch.equal(batch.unprompted().ids, empty_captions(batch.ids))
    some = torch.arange(len(batch.ids)) % 2 == 0
    mixed = batch.unprompted(some).ids
    assert torch.equal(mixed[~some], batch.ids[~some])
    assert torch.equal(mixed[some], empty_captions(batch.ids)[some])
    for frame, ids in zip(batch.clean, batch.ids, strict=True):
        shown = next(i for i, value in enumerate(data.first_values) if torch.equal(value, frame))
        assert any(torch.equal(ids, row) for row in data.first_wordings.ids[shown].flatten(0, 1))
    assert not batch.of_frame.any()
    with torch.no_grad():
        values = ar.objective(generator, data, data.layout(2), step_rng(1, 0))
    torch.testing.assert_close(values["loss"], values["clips"] + values["beginnings"])


def test_some_clips_are_read_under_their_last_caption(root):
    generator = model.new_generator(root, 4, PRESET)
    data = dataclasses.replace(ar.load_data(root, generator, CPU), clips=64)
    batch = data.batch(data.layout(1), step_rng(1, 0))
    switched = batch.of_frame.amax(1) > batch.of_frame[:, 0]
    recached = (batch.of_clean != batch.of_frame).any(1)
    assert 0 < recached.sum() < switched.sum()
    assert torch.equal(batch.of_clean[recached], torch.ones_like(batch.of_clean[recached]))
    assert not (recached & ~switched).any()


def test_clips_that_open_as_streams_do_or_show_what_is_hard_are_drawn_more_often(root, monkeypatch):
    monkeypatch.setattr(ar, "ODDS", {"circling": 3.0, "cross": 2.0, "small": 1.5})
    generator = model.new_generator(root, 4, PRESET)
    data = ar.load_data(root, generator, CPU)
    clips = latents.load(root / "latents").clips
    numbers = torch.arange(len(clips)).view(-1, 1, 1).expand(-1, 1, 5)
    drawn = dataclasses.replace(data, values=numbers, clips=5000).batch(data.layout(1), step_rng(1, 0)).clean[:, 0, 0]
    things = [[thing for scene in clip.scenes for thing in scene.things] for clip in clips]
    wanted = np.array(
        [
            max(
                (3 if t.motion == "circling" else 1)
                * (2 if t.shape == "cross" else 1)
                * (1.5 if t.size == "small" else 1)
                for t in found
            )
            for found in things
        ]
    )
    assert len(set(wanted)) > 3
    wanted = wanted * np.repeat([1, 3], 4)
    assert np.bincount(drawn, minlength=len(clips)) / 5000 == pytest.approx(wanted / wanted.sum(), abs=0.02)


def test_a_copy_of_the_teacher_is_asked_for_more_of_what_the_caption_changes(root, tmp_path):
    branch(root, tmp_path)
    ar.train(tmp_path, preset=PRESET, schedule=dataclasses.replace(SCHEDULE, steps=16, learning_rate=1e-2))
    teacher, student = (model.new_generator(tmp_path, 5, PRESET) for _ in range(2))
    for generator in (teacher, student):
        generator.load(model.load_generator(tmp_path, "ar"))
    data = ar.load_data(tmp_path, student, CPU)

    def error(guidance):
        with torch.no_grad():
            random = step_rng(1, UNSEEN)
            return float(
                guided.guided_error(teacher, student, data.first_frames(random), random, CPU, guidance=guidance)
            )

    assert error(1.0) == pytest.approx(0, abs=1e-12)
    assert error(3.0) == pytest.approx(4 * error(2.0), rel=1e-3)
    assert error(2.0) > 0


def test_the_guided_copy_goes_on_learning_from_the_data(root, tmp_path):
    branch(root, tmp_path)
    ar.train(tmp_path, preset=PRESET, schedule=dataclasses.replace(SCHEDULE, steps=16, learning_rate=1e-2))
    run = guided.train(tmp_path, preset=PRESET, schedule=dataclasses.replace(SCHEDULE, steps=16, learning_rate=1e-2))
    teacher, student = (model.new_generator(tmp_path, 5, PRESET) for _ in range(2))
    data = ar.load_data(tmp_path, student, CPU)
    for generator in (teacher, student):
        generator.load(model.load_generator(tmp_path, "ar"))

    def clips():
        with torch.no_grad():
            values = guided.objective(teacher, student, data, data.layout(2), step_rng(1, UNSEEN), guidance=2.0)
            return float(values["clips"])

    before = clips()
    student.load(student.parameters | run.parameters)
    assert clips() < before


def test_the_teacher_goes_on_with_first_frames_alone(root, tmp_path):
    branch(root, tmp_path)
    ar.train(tmp_path, preset=PRESET, schedule=SCHEDULE)
    generator = model.new_generator(tmp_path, 5, PRESET)
    data = ar.load_data(tmp_path, generator, CPU)

    def first_frames(tensors):
        generator.load(tensors)
        with torch.no_grad():
            return float(ar.first_frames_error(generator, data, step_rng(1, UNSEEN)))

    long = dataclasses.replace(SCHEDULE, steps=16, learning_rate=1e-2)
    run = ar.train(tmp_path, preset=PRESET, schedule=long, stage="first-frames")
    assert not any(name.startswith("text_encoder.") for name in run.parameters)
    before = model.load_generator(tmp_path, "ar")
    assert first_frames(before | run.parameters) < first_frames(before)
    guided.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1, guide="first-frames")
    (tmp_path / "first-frames" / "ema.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        guided.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=2, guide="first-frames")


def test_half_of_the_clips_follow_a_past_that_the_student_has_made(root, monkeypatch):
    student = model.new_generator(root, 5, PRESET)
    torch.nn.init.normal_(student.transformer.head.head.weight, generator=torch.Generator().manual_seed(1))
    data = dataclasses.replace(ar.load_data(root, student, CPU), clips=4)
    batch = data.batch(data.layout(2), step_rng(1, 0))
    history = guided.resampled(student, batch, step_rng(1, 1), CPU)
    changed = (history != batch.clean).flatten(1).any(1)
    assert changed.tolist() == [True, True, False, False]
    assert torch.equal(history[:, :, 0], batch.clean[:, :, 0])
    assert (history != batch.clean)[:2, :, 1:].any((1, 3, 4)).all()
    assert not history.requires_grad
    own, made = (
        ar.velocity_error(student, batch, step_rng(1, 2), CPU, history=past).item() for past in (batch.clean, history)
    )
    assert own == ar.velocity_error(student, batch, step_rng(1, 2), CPU).item() != made
    read = []

    def velocity(self, generator, context, *arguments):
        read.append(context)
        return torch.ones_like(context)

    times = set()
    with monkeypatch.context() as patched:
        patched.setattr(ar.Batch, "velocity", velocity)
        for step in range(20):
            read.clear()
            last = guided.resampled(student, batch, step_rng(1, step), CPU)[:2]
            times.add(len(read))
            assert torch.equal(read[0], batch.clean[:2])
            for before, after in itertools.pairwise([*read, last]):
                assert not torch.allclose(before, after, atol=1e-2)
    assert times == {1, 2, 3}
    monkeypatch.setattr(guided, "RESAMPLED_FROM", 0.0)
    assert torch.equal(guided.resampled(student, batch, step_rng(1, 1), CPU), batch.clean)


def test_the_guided_copy_learns_what_long_streams_should_have_shown(root, tmp_path, monkeypatch):
    branch(root, tmp_path)
    monkeypatch.setattr(model, "get_preset", lambda _name: PRESET)
    monkeypatch.setattr(streams, "SHARD_STREAMS", 3)
    monkeypatch.setattr(streams, "STRETCHES", 2)
    ar.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1)
    lightvae.train(tmp_path, config=LIGHT, large_config=VAE, schedule=SCHEDULE, until=1)

    def train(until):
        return guided.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=until, guidance=1.0, with_streams=True)

    with pytest.raises(FileNotFoundError, match=r"training\.streams"):
        train(1)
    export.export(tmp_path, tmp_path / "out", stage="ar")
    engine = Engine.load(model.embedded_preset(tmp_path), vae="lightvae", weights_dir=tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "seen", lambda *_: None)
        with pytest.raises(ValueError, match="no object of these streams"):
            streams.build(tmp_path, engine, streams=2)
    places = iter([None, None, *[world.Placement(16.0, 32.0, 0.0)] * 3, None])
    monkeypatch.setattr(streams, "seen", lambda *_: next(places))
    asked: list[str] = []
    ask = cohort.Cohort.update_prompt
    monkeypatch.setattr(
        cohort.Cohort, "update_prompt", lambda self, prompts: (asked.extend(prompts), ask(self, prompts))
    )
    streams.build(tmp_path, engine, streams=2)
    sizes = {word for words in captions.SIZE_WORDS.values() for word in words}
    assert len(asked) == 3
    assert all(sizes & set(text.lower().split()) for text in asked)  # a stream would choose one
    streams.build(tmp_path, engine, streams=2)  # nothing is missing: nobody looks again
    student = model.new_generator(root, 5, PRESET)
    made = streams.load_streams(tmp_path, student.tokenizer, 64)
    assert made.histories.shape == made.values.shape == (4, 16, 5, 8, 8)  # the first stream was never read
    assert torch.equal(made.histories[:, :, 0], made.values[:, :, 0])
    assert ((made.histories - made.values)[:, :, 1:].flatten(1).square().mean(1) > 0.1).all()
    data = dataclasses.replace(ar.load_data(root, student, CPU), clips=3)
    batch = data.batch(data.layout(2), step_rng(1, 0))
    joined, history = guided.with_stretches(made, 1, batch, batch.clean, step_rng(1, 1))
    (chosen,) = (i for i in range(4) if torch.equal(joined.clean[2], made.values[i]))
    assert torch.equal(history[2], made.histories[chosen])
    known = made.wordings.ids.shape[-1]
    assert any(torch.equal(joined.ids[4, :known], row) for row in made.wordings.ids[chosen, 0])
    assert (joined.ids[4, known:] == PAD_ID).all()
    assert not joined.of_frame[2].any()
    assert not joined.of_clean[2].any()
    for kept, before in ((joined.clean, batch.clean), (history, batch.clean), (joined.of_frame, batch.of_frame)):
        assert torch.equal(kept[:2], before[:2])
    assert torch.equal(joined.ids[:4, : batch.ids.shape[1]], batch.ids[:4])
    assert joined.layout == batch.layout
    train(2)
    first = train(None).parameters
    shutil.rmtree(tmp_path / "guided")
    assert_same(train(None).parameters, first)


def test_the_guided_copy_learns_from_worn_stretches_with_and_without_streams(root, tmp_path, monkeypatch):
    branch(root, tmp_path)
    monkeypatch.setattr(worn, "SHARD_STRETCHES", 4)
    worn.build(tmp_path, stretches=3, config=VAE)
    before = (tmp_path / "worn" / "shard-0000.safetensors").stat().st_mtime_ns
    worn.build(tmp_path, stretches=4, config=VAE)  # nothing is missing
    assert before == (tmp_path / "worn" / "shard-0000.safetensors").stat().st_mtime_ns
    tokenizer = model.new_generator(root, 5, PRESET).tokenizer
    made = streams.load_streams(tmp_path, tokenizer, 64)
    assert made.histories.shape == made.values.shape == (4, 16, 5, 8, 8)
    assert torch.equal(made.histories[:, :, 0], made.values[:, :, 0])
    off = (made.histories - made.values)[:, :, 1:].abs().flatten(1).amax(1)
    assert len(set(off.tolist())) == 4
    assert (off > 0).all()
    (tmp_path / "streams").symlink_to(tmp_path / "worn")
    both = streams.load_streams(tmp_path, tokenizer, 64)
    assert len(both.values) == len(both.wordings.ids) == 8
    ar.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1)
    guided.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1, guidance=1.0, with_streams=True)


def test_some_steps_read_few_frames_as_after_a_flush():
    windows = [guided.draw_window(step_rng(1, step)) for step in range(400)]
    assert {window for window in windows if window != model.WINDOW_FRAMES} == set(range(3, model.WINDOW_FRAMES))
    assert 0.1 < sum(window != model.WINDOW_FRAMES for window in windows) / 400 < 0.3


def test_a_compiled_pass_gives_the_same_loss(root, monkeypatch):
    traced = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)  # without a minute of C++
    monkeypatch.setattr(torch, "compile", traced)
    generator = model.new_generator(root, 5, PRESET)
    torch.nn.init.normal_(generator.transformer.head.head.weight, generator=torch.Generator().manual_seed(1))
    losses = []
    for device in (CPU, Device(compiled=True)):
        data = ar.load_data(root, generator, device)
        assert (data.block_pass is not None) == device.compiled
        random = step_rng(1, UNSEEN)
        with torch.no_grad():
            losses.append(ar.velocity_error(generator, data.batch(data.layout(2), random), random, device).item())
    torch.compiler.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("faulty", [False, True])
def test_compilation_is_given_up_where_it_changes_the_gradients(root, monkeypatch, faulty, capsys):
    """A fresh generator's head is zero, so that nothing behind it has a gradient unless the weights are nudged."""
    monkeypatch.setattr(ar, "compiled", lambda: forgetful if faulty else teacher_forcing._block)

    def forgetful(block, x, memory):
        return teacher_forcing._block(block, x.detach(), memory)

    generator = model.new_generator(root, 5, PRESET)
    before = {name: value.clone() for name, value in generator.parameters.items()}

    def step_loss(data, random):
        return {"loss": ar.velocity_error(generator, data.batch(data.layout(2), random), random, CPU)}

    rehearse = ar.rehearsal(step_loss, generator.parameters, 1)
    data = ar.load_data(root, generator, Device(compiled=True), warm_up=rehearse)
    assert (data.block_pass is None) == faulty
    assert capsys.readouterr().err.startswith("goes on without" if faulty else "compiled")
    assert_same(before, generator.parameters)
    assert all(parameter.grad is None for parameter in generator.parameters.values())


def test_frames_soon_after_the_first_count_more():
    weights = guided.frame_weights(16, torch.device("cpu"))
    assert weights.mean().item() == pytest.approx(1)
    assert (weights / weights[-1]).tolist() == pytest.approx([0, 3, 3, 3, 3] + [1] * 11)


def test_a_frame_counts_as_much_as_its_weight_says(root):
    generator = model.new_generator(root, 5, PRESET)
    torch.nn.init.normal_(generator.transformer.head.head.weight, generator=torch.Generator().manual_seed(1))
    data = ar.load_data(root, generator, CPU)
    batch = data.batch(data.layout(2), step_rng(1, 0))

    def error(weights):
        return ar.velocity_error(generator, batch, step_rng(1, 2), CPU, weights=weights).item()

    each = torch.eye(10).view(10, 2, 5) * 10
    errors = [error(weights) for weights in each]
    assert len(set(errors)) == 10
    assert error(None) == pytest.approx(sum(errors) / 10, rel=1e-5)


def test_only_stages_that_train_the_generator_can_compile():
    for compiles in (False, True):
        parser = argparse.ArgumentParser()
        add_arguments(parser, compiles=compiles)
        assert not parser.parse_args([]).compile
        assert ("--compile" in parser.format_help()) == compiles


def test_bfloat16_is_for_products_alone(root):
    generator = model.new_generator(root, 5, PRESET)
    data = ar.load_data(root, generator, CPU)
    computed = []
    generator.transformer.blocks[0].self_attn.o.register_forward_hook(
        lambda _m, _i, output: computed.append(output.dtype)
    )
    errors = []
    for device in (CPU, Device(bfloat16=True)):
        random = step_rng(1, UNSEEN)
        error = ar.velocity_error(generator, data.batch(data.layout(2), random), random, device)
        error.backward()
        errors.append(error.item())
    assert computed == [torch.float32, torch.bfloat16]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert {parameter.grad.dtype for parameter in generator.transformer.parameters()} == {torch.float32}


def test_the_student_becomes_consistent(root, tmp_path):
    branch(root, tmp_path)
    ar.train(tmp_path, preset=PRESET, schedule=dataclasses.replace(SCHEDULE, steps=16, learning_rate=1e-2))
    long = dataclasses.replace(SCHEDULE, steps=16, learning_rate=2e-3)
    run = cd.train(tmp_path, preset=PRESET, schedule=long, teacher_stage="ar")
    teacher, student = (model.new_generator(tmp_path, 5, PRESET) for _ in range(2))
    data = ar.load_data(tmp_path, student, CPU)
    for generator in (teacher, student):
        generator.load(model.load_stage(tmp_path, "ar"))

    def loss():
        with torch.no_grad():
            draws = [step_rng(1, UNSEEN + i) for i in range(4)]
            batches = [cd.objective(teacher, student, data, data.layout(2), random) for random in draws]
        return sum(float(batch["loss"]) for batch in batches)

    start = loss()
    student.load(student.parameters | run.parameters)
    assert loss() < start


def test_a_bidirectional_teacher_leads_whole_clips_from_level_to_level(root, monkeypatch):
    teacher, student = (model.new_generator(root, 5, PRESET) for _ in range(2))
    data = ar.load_data(root, student, CPU)
    passes = []

    def velocity(batch, generator, _context, noisy, sigmas, _prompts):
        passes.append((generator is teacher, batch.layout.bidirectional, sigmas.view(len(noisy), 2, -1)))
        return torch.zeros_like(noisy)

    monkeypatch.setattr(ar.Batch, "velocity", velocity)
    for bidirectional in (False, True):
        passes.clear()
        batch = data.batch(data.layout(2), step_rng(1, 0))
        cd.inconsistency(teacher, student, batch, step_rng(1, 1), CPU, bidirectional=bidirectional)
        assert [kind[:2] for kind in passes] == [(True, bidirectional), (False, False), (False, False)]
        for _, _, sigmas in passes:
            assert (sigmas == sigmas[:, :, :1]).all() == bidirectional


def test_what_kept_its_text_encoder_is_loaded_with_that_of_its_teacher(root, tmp_path):
    branch(root, tmp_path)
    for stage, teacher in (("ar", "ar"), ("bidirectional", "bidirectional")):
        ar.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1, stage=stage)
        cd.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1, teacher_stage=teacher)
        loaded, own = model.load_generator(tmp_path, f"cd-{teacher}"), model.load_stage(tmp_path, stage)
        assert own.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], own[name]) for name in own if name.startswith("text_encoder."))


def test_latents_are_made_once_and_know_their_data(root):
    folder = root / "latents"
    index = json.loads((folder / "index.json").read_text())
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    data = latents.build(root, clips=8, beginnings=20, two_objects=0.0, config=VAE)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == before
    assert data.data_hash == index["data_hash"]
    assert data.values.shape == (8, 16, 5, 8, 8)
    torch.testing.assert_close(data.values.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(data.values.std((0, 2, 3, 4)), torch.ones(16), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lost", [[], ["shard-0000"], ["shard-0000", "shard-0001"]])
def test_stages_that_wait_learn_of_every_clip_even_of_those_that_were_made_before(root, tmp_path, lost):
    for name in ("vae", "text"):
        (tmp_path / name).symlink_to(root / name)
    shutil.copytree(root / "latents", tmp_path / "latents")
    for name in lost:
        (tmp_path / "latents" / f"{name}.safetensors").unlink()
    data = latents.build(tmp_path, clips=8, beginnings=20, two_objects=0.0, config=VAE, wait=True)
    assert latents.published(tmp_path / "latents") == list(data.clips)
    assert len(data.clips) == 8
    ar.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1, wait=True)


def test_a_missing_data_set_says_what_to_run(tmp_path):
    (tmp_path / "latents").mkdir()
    with pytest.raises(FileNotFoundError, match=r"training\.latents"):
        latents.load(tmp_path / "latents")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run(tmp_path, {"a": torch.zeros(2)}, SCHEDULE, 0).save()
    with pytest.raises(ValueError, match="does not belong to this model"):
        Run(tmp_path, {"b": torch.zeros(2)}, SCHEDULE, 0)


def test_export_loads_strictly_and_is_evaluated(root, tmp_path, monkeypatch, capsys):
    branch(root, tmp_path)
    monkeypatch.setattr(model, "get_preset", lambda _name: PRESET)
    lightvae.train(tmp_path, config=LIGHT, large_config=VAE, schedule=SCHEDULE, until=1)
    for stage in (ar, guided, cd):
        stage.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1)
    preset = model.embedded_preset(tmp_path)
    size = export.export(tmp_path, tmp_path / "out")
    assert 0 < size < export.LIMIT_BYTES
    for name in ("wan", "lightvae"):
        engine = Engine.load(preset, vae=name, weights_dir=tmp_path / "out")
        assert engine.text_encoder is not None
        encoded = engine.text_encoder.encode(["Ünknown wörds 漢字"])[0].embeds
        assert torch.isfinite(encoded).all()
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "a red ball", "colour": "red", "shape": "circle"}\n')
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = ["--training", str(tmp_path), "--prompts", str(questions), "--steps", "1000,500", "--switches", "1"]
    words += [
        "--blends",
        "1",
        "--drift",
        "4",
        "--output",
        str(tmp_path / "report.json"),
        "--sheet",
        str(tmp_path / "sheet.png"),
    ]
    assert evaluate.run(parser.parse_args(words)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["follow"]["attributes"]["colour"]["count"] == 1
    assert set(report["switches"]) == {"cross_attention", "recache", "flush", "scene_cut"}
    assert all(sum(answers.values()) == 1 for answers in report["blends"]["transition"])
    assert report["settings"]["denoising_steps"] == [1000, 500]
    assert (tmp_path / "sheet.png").stat().st_size > 0
    assert "dynamic degree" in capsys.readouterr().out


def test_a_training_goes_on_from_what_was_exported(root, tmp_path, monkeypatch):
    branch(root, tmp_path)
    monkeypatch.setattr(model, "get_preset", lambda _name: PRESET)
    lightvae.train(tmp_path, config=LIGHT, large_config=VAE, schedule=SCHEDULE, until=1)
    ar.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1)
    guided.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1)
    export.export(tmp_path, tmp_path / "out", stage="guided")
    other = tmp_path / "other"
    shipped.unpack(other, tmp_path / "out")
    assert_same(model.load_generator(other, "ar"), model.load_generator(tmp_path, "guided"))
    for stage in ("vae", "lightvae"):
        assert_same(model.load_stage(other, stage), model.load_stage(tmp_path, stage))
    for name in ("latents", "beginnings"):
        (other / name).symlink_to(root / name)
    guided.train(other, preset=PRESET, schedule=SCHEDULE, until=1, guidance=1.0)
    assert export.export(other, other / "out", stage="guided") > 0
    with pytest.raises(FileExistsError, match="vae has weights already"):
        shipped.unpack(other, tmp_path / "out")


def test_the_light_vae_learns_what_the_large_one_draws_of_generated_clips(root, tmp_path, monkeypatch):
    branch(root, tmp_path)
    monkeypatch.setattr(model, "get_preset", lambda _name: PRESET)
    monkeypatch.setattr(generated, "SHARD_CLIPS", 2)
    monkeypatch.setattr(generated, "FRAMES", 3)
    ar.train(tmp_path, preset=PRESET, schedule=SCHEDULE, until=1)
    lightvae.train(tmp_path, config=LIGHT, large_config=VAE, schedule=SCHEDULE, until=1)
    (tmp_path / "lightvae").rename(tmp_path / "before")
    with pytest.raises(FileNotFoundError, match=r"training\.generated"):
        lightvae.train(tmp_path, config=LIGHT, large_config=VAE, schedule=SCHEDULE, with_generated=True)
    export.export(tmp_path, tmp_path / "out", stage="ar")
    engine = Engine.load(model.embedded_preset(tmp_path), vae="wan", weights_dir=tmp_path / "out")
    generated.build(tmp_path, engine, clips=4)
    generated.build(tmp_path, engine, clips=4)
    clips, frames = generated.load(tmp_path)
    assert clips.shape == (4, 16, 3, 8, 8)
    assert frames.shape == (4, 9, 64, 64, 3)
    large = load_file(root / "vae" / "ema.safetensors")
    video = vae.as_video(frames)
    assert lightvae.generated_objective(large, VAE, clips, video)["loss"] < 0.01  # all but rounded to 8 bits
    long = dataclasses.replace(SCHEDULE, steps=24, learning_rate=1e-2)

    def run(until, config=LIGHT):
        return lightvae.train(
            tmp_path,
            config=config,
            large_config=VAE,
            schedule=long,
            until=until,
            begin="before",
            with_generated=True,
        )

    def loss(parameters, config=LIGHT):
        with torch.no_grad():
            return float(lightvae.generated_objective(parameters, config, clips, video)["loss"])

    deeper = dataclasses.replace(LIGHT, num_res_blocks=2)
    start = loss(run(0, deeper).parameters, deeper)
    shutil.rmtree(tmp_path / "lightvae")
    assert_same(run(0).parameters, model.load_stage(tmp_path, "before"))
    assert loss(run(0).parameters) == pytest.approx(start, rel=1e-4)
    assert loss(run(None).parameters) < 0.9 * start


def test_tokenizer_accepts_any_text(root):
    tokenizer = FileTokenizer(root / "text" / "tokenizer.json")
    for text in ("a red circle", "日本 🎈", "\x00\t"):
        ids = tokenizer.encode(text)
        assert ids[-1] == 1
        assert all(3 <= i < VOCABULARY for i in ids[:-1])
    assert tokenizer.encode("A Red Circle") == tokenizer.encode("a red circle")


def test_orthogonalise_flattens_the_spectrum():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(12, 30)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_optimizer_minimises():
    target = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    value = torch.zeros(8, 8, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    optimizer = Optimizer({"weight": value, "bias": bias})
    assert optimizer.matrices == {"weight"}
    for step in range(150):
        ((value - target).square().sum() + (bias - 1).square().sum()).backward()
        optimizer.step(step, 0.1 * (1 - step / 150))
    assert (value - target).norm() < 0.3 * target.norm()
    assert (bias - 1).abs().max() < 0.2


def test_a_cut_off_log_line_does_not_prevent_resuming(tmp_path):
    value = torch.zeros(3)
    run = Run(tmp_path, {"a": value}, SCHEDULE, 0)
    run.train(lambda _step, _random: {"loss": (value - 1).square().sum()}, until=2)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    again = Run(tmp_path, {"a": torch.zeros(3)}, SCHEDULE, 0)
    assert again.step == 2
    assert [record["step"] for record in read_log(tmp_path)] == [0, 1]


def test_a_run_stops_at_a_signal_and_keeps_what_it_has(tmp_path):
    value = torch.zeros(3)
    run = Run(tmp_path, {"a": value}, dataclasses.replace(SCHEDULE, steps=50, save_every=1000), 0)

    def objective(step, _random):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": (value - 1).square().sum()}

    run.train(objective)
    assert run.step == 4
    assert run.exit_status == 143
    assert Run(tmp_path, {"a": torch.zeros(3)}, SCHEDULE, 0).step == 4
