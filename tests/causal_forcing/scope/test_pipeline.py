"""The pipeline as Scope loads and calls it: registered by the hook, built from its schema, called for every chunk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from scope.core.nodes.registry import NodeRegistry
from scope.core.pipelines.interface import Pipeline
from scope.core.plugins.hookspecs import ScopeHookSpec

from causal_forcing.config import DEFAULT_STEPS, TinyVaeConfig
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest
from causal_forcing.presets import get_preset
from causal_forcing.scope import in_process, plugin
from causal_forcing.scope.requests import Parameters, Start

SMALL = {"preset": "tiny", "height": 64, "width": 64, "window_frames": 4, "device": "cpu"}


def registered() -> type:
    """Return the class that the plugin registers through Scope's hook."""
    classes: list[type] = []
    manager = pluggy.PluginManager("scope")
    manager.add_hookspecs(ScopeHookSpec)
    manager.register(plugin)
    manager.check_pending()
    manager.hook.register_pipelines(register=classes.append)
    (pipeline_class,) = classes
    return pipeline_class


def load(**chosen: Any) -> Any:
    """Return the pipeline, built like Scope's loader does: all defaults that are not None, and what was chosen."""
    pipeline_class: Any = registered()
    fields = pipeline_class.get_config_class().model_fields
    defaults = {name: field.default for name, field in fields.items() if field.default is not None}
    return pipeline_class(**{**defaults, **SMALL, **chosen})


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load()


def test_the_entry_point_is_declared() -> None:
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    assert '[project.entry-points.scope]\ncausal_forcing = "causal_forcing.scope.plugin"' in pyproject.read_text()


def test_scopes_registry_takes_it_under_its_name() -> None:
    pipeline_class = registered()
    NodeRegistry.register(pipeline_class)
    assert NodeRegistry.get("causal-forcing") is pipeline_class


def test_it_is_a_pipeline_of_scope_with_the_plugins_parameters() -> None:
    pipeline_class: Any = registered()
    assert issubclass(pipeline_class, Pipeline)
    config = pipeline_class.get_config_class()
    assert config.pipeline_id == "causal-forcing"
    defaults = config().model_dump()
    expected = {
        "height": 480,
        "width": 832,
        "base_seed": 42,
        "denoising_steps": [1000, 750, 500, 250],
        "vae_type": "wan",
        "manage_cache": True,
        "quantization": None,
    }
    assert {name: defaults[name] for name in expected} == expected
    schema = config.get_schema_with_metadata()["config_schema"]["properties"]
    assert all("ui" in schema[name] for name in (*expected, "server", "switch_policy", "first_frame_image"))


@pytest.mark.parametrize(("name", "value"), [("vae_type", "vqgan"), ("quantization", "int4"), ("base_seed", -1)])
def test_a_wrong_load_parameter_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        load(**{name: value})


def test_a_size_the_model_cannot_have_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="height"):
        load(height=72)


def test_frames_are_thwc_floats_in_unit_range(pipeline: Any) -> None:
    assert pipeline.prepare() is None
    first = pipeline(prompts="a red circle", init_cache=True)["video"]
    second = pipeline(prompts="a red circle", init_cache=False)["video"]
    assert first.shape == (1, 64, 64, 3)  # shown after one latent frame
    assert second.shape == (4, 64, 64, 3)
    for video in (first, second):
        assert video.dtype is torch.float32
        assert 0 <= float(video.min()) <= float(video.max()) <= 1


@pytest.mark.parametrize(
    ("given", "window", "sink"),
    [({"window_frames": 21}, 9, 1), ({"window_frames": 5, "sink_frames": 2}, 5, 2), ({"window_frames": 1}, 1, 0)],
)
def test_the_model_looks_back_as_far_as_it_was_made_to_unless_told(
    given: dict[str, int], window: int, sink: int
) -> None:
    config = load(**given)._backend._session_config
    assert (config.window_frames, config.sink_frames) == (window, sink)


@pytest.mark.parametrize(
    ("loaded", "called", "steps", "first"),
    [
        (DEFAULT_STEPS, DEFAULT_STEPS, DEFAULT_STEPS, get_preset("tiny").first_chunk_steps),
        (DEFAULT_STEPS, None, DEFAULT_STEPS, get_preset("tiny").first_chunk_steps),
        ((1000, 500), None, (1000, 500), None),
        (DEFAULT_STEPS, (1000, 500), (1000, 500), None),
        ((1000, 500), DEFAULT_STEPS, DEFAULT_STEPS, get_preset("tiny").first_chunk_steps),
    ],
)
def test_the_model_takes_the_steps_it_was_made_for_unless_told(
    loaded: tuple[int, ...], called: tuple[int, ...] | None, steps: tuple[int, ...], first: tuple[int, ...] | None
) -> None:
    run = load(denoising_steps=list(loaded))
    run(prompts="a red circle", init_cache=True, denoising_step_list=list(called) if called else None)
    config = run._backend._session.config
    assert (config.denoising_steps, config.first_chunk_steps) == (steps, first)


def test_without_a_prompt_nothing_is_made(pipeline: Any) -> None:
    assert load_like_new(pipeline)(init_cache=True) == {}


def test_a_reset_leaves_nothing_behind(pipeline: Any) -> None:
    run = load_like_new(pipeline)
    fresh = [run(prompts="a red circle", init_cache=index == 0)["video"] for index in range(3)]
    run(prompts="snow", switch_policy="scene_cut", init_cache=False)
    again = [run(prompts="a red circle", init_cache=index == 0)["video"] for index in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


@pytest.mark.parametrize("vae_type", ["tae", "lighttae"])
def test_a_reset_leaves_nothing_in_a_tiny_decoder(monkeypatch: pytest.MonkeyPatch, vae_type: str) -> None:
    vaes = {"tae": TinyVaeConfig((16, 8, 8, 8)), "lighttae": TinyVaeConfig((16, 8, 8, 8), False)}
    preset = replace(get_preset("tiny"), vaes=vaes, trained=False)
    monkeypatch.setattr(in_process, "get_preset", lambda name: preset)
    run = load(vae_type=vae_type)
    fresh = [run(prompts="a red circle", init_cache=index == 0)["video"] for index in range(3)]
    again = [run(prompts="a red circle", init_cache=index == 0)["video"] for index in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


def test_a_transition_is_active_for_its_chunks(pipeline: Any) -> None:
    run = load_like_new(pipeline)
    run(prompts="a red circle", init_cache=True)
    transition = {"target_prompts": [{"text": "a blue square", "weight": 1.0}], "num_steps": 3}
    active = []
    for _ in range(3):
        run(prompts="a red circle", transition=transition, init_cache=False)
        active.append(run.state["_transition_active"])
    assert active == [True, True, False]


def test_no_update_is_dropped_however_many_come(pipeline: Any) -> None:
    run, other = load_like_new(pipeline), load()
    texts = [f"prompt {index}" for index in range(12)]  # each holds for the chunk it came with
    told = [run(prompts=text, init_cache=index == 0)["video"] for index, text in enumerate(texts)]
    expected = [other(prompts=text, init_cache=index == 0)["video"] for index, text in enumerate(texts)]
    assert all(torch.equal(a, b) for a, b in zip(told, expected, strict=True))
    going_on = run(prompts=texts[-1], init_cache=False)["video"]
    assert not torch.equal(going_on, other(prompts="another", init_cache=False)["video"])


def test_the_video_begins_with_the_picture(pipeline: Any, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 64), (255, 0, 0)).save(path)
    run = load_like_new(pipeline)
    plain = run(prompts="a red circle", init_cache=True)["video"]
    started = run(prompts="a red circle", init_cache=True, first_frame_image=str(path))["video"]
    assert started.shape == plain.shape == (1, 64, 64, 3)
    assert not torch.equal(started, plain)
    assert run(prompts="a red circle", init_cache=False)["video"].shape == (4, 64, 64, 3)


def test_a_refused_parameter_leaves_the_stream_running(pipeline: Any) -> None:
    run = load_like_new(pipeline)
    run(prompts="a red circle", init_cache=True)
    with pytest.raises(InvalidRequest, match="switch_policy"):
        run(prompts="snow", switch_policy="forget", init_cache=False)
    assert run(prompts="a red circle", init_cache=False)["video"].shape == (4, 64, 64, 3)


def test_a_refused_picture_leaves_the_stream_running_and_is_forgotten(pipeline: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    run, twin = load_like_new(pipeline), load()
    for stream in (run, twin):
        stream(prompts="a red circle", init_cache=True)
    with pytest.raises(InvalidRequest, match="image"):
        run(prompts="a red circle", init_cache=True, first_frame_image=str(path))
    for init_cache, frames in ((False, 4), (True, 1)):
        expected = twin(prompts="a red circle", init_cache=init_cache)["video"]
        assert expected.shape[0] == frames
        assert torch.equal(run(prompts="a red circle", init_cache=init_cache)["video"], expected)


def test_a_refused_picture_does_not_keep_a_stream_from_beginning(pipeline: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    run = load_like_new(pipeline)
    with pytest.raises(InvalidRequest, match="image"):
        run(prompts="a red circle", init_cache=True, first_frame_image=str(path))
    assert run(prompts="a red circle", init_cache=False)["video"].shape == (1, 64, 64, 3)


def test_weights_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    original = Engine.load
    monkeypatch.setattr(Engine, "load", lambda *args, **kwargs: loads.append(1) or original(*args, **kwargs))
    run = load()
    for index in range(3):
        run(prompts="a red circle", init_cache=index != 1)
    assert loads == [1]
    run.shutdown()


def load_like_new(pipeline: Any) -> Any:
    """Return the shared pipeline with its parameters forgotten, so that tests do not depend on each other."""
    pipeline._parameters = Parameters(Start(42), default_steps=DEFAULT_STEPS)
    pipeline.state["_transition_active"] = False
    return pipeline
