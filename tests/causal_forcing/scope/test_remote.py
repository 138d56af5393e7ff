"""The pipeline as the client of a server: the gateway's session on a port of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from causal_forcing.errors import InvalidRequest
from causal_forcing.scope.pipeline import CausalForcingPipeline
from serve.client import VideoServiceError
from tests.serve.fakes import LOST, FakeBackends
from tests.serve.server import serving_in_background


@pytest.fixture
def backends() -> FakeBackends:
    return FakeBackends()


@pytest.fixture
def server(backends: FakeBackends) -> Iterator[str]:
    with serving_in_background(backends) as address:
        yield address


def load(server: str, **chosen: Any) -> CausalForcingPipeline:
    return CausalForcingPipeline(server=server, height=64, width=64, window_frames=8, **chosen)


def test_chunks_come_from_the_server(server: str) -> None:
    run = load(server)
    first = run(prompts="a red circle", init_cache=True)["video"]
    second = run(prompts="a red circle", init_cache=False)["video"]
    assert first.shape == (1, 64, 64, 3)
    assert second.shape == (4, 64, 64, 3)
    for video in (first, second):
        assert video.dtype is torch.float32
        assert 0 <= float(video.min()) <= float(video.max()) <= 1
    run.shutdown()


def test_shutdown_gives_the_generator_back(server: str, backends: FakeBackends) -> None:
    run = load(server)
    run(prompts="a red circle", init_cache=True)
    assert backends.running == 1
    run.shutdown()
    assert "leave" in _eventually(backends)


def test_a_reset_keeps_the_generator_and_begins_a_new_scene(server: str, backends: FakeBackends) -> None:
    run = load(server)
    run(prompts="a red circle", init_cache=True)
    run(prompts="a red circle", init_cache=False)
    again = run(prompts="a red circle", init_cache=True)["video"]  # chunks of the old scene under way are passed over
    assert again.shape == (1, 64, 64, 3)
    assert run(prompts="a red circle", init_cache=False)["video"].shape == (4, 64, 64, 3)
    assert len([event for event in backends.events if event.startswith("confirm")]) == 1
    run.shutdown()


def test_another_seed_needs_another_session(server: str, backends: FakeBackends) -> None:
    run = load(server)
    run(prompts="a red circle", init_cache=True)
    run(prompts="a red circle", init_cache=True, base_seed=7)
    assert len([event for event in backends.events if event.startswith("confirm")]) == 2
    run.shutdown()


def test_a_picture_goes_to_the_server(server: str, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 64), (255, 0, 0)).save(path)
    run = load(server)
    video = run(prompts="a red circle", init_cache=True, first_frame_image=str(path))["video"]
    assert video.shape == (1, 64, 64, 3)
    run.shutdown()


def test_a_lost_session_is_an_error_once_and_then_a_new_session(server: str, backends: FakeBackends) -> None:
    run = load(server)
    run(prompts="a red circle", init_cache=True)
    backends.decode_failures.append(LOST)
    with pytest.raises(VideoServiceError, match="gone"):
        _call_often(run)
    assert run(prompts="a red circle", init_cache=False)["video"].shape == (1, 64, 64, 3)
    run.shutdown()


@pytest.mark.parametrize(
    ("field", "value"),
    [("preset", "longlive"), ("quantization", "fp8_e4m3fn"), ("model_dir", "weights"), ("loras", [{"path": "a"}])],
)
def test_what_only_the_engine_understands_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field):
        load("127.0.0.1:9", **{field: value})


def test_a_vae_that_the_server_does_not_have_is_refused(server: str) -> None:
    run = load(server, vae_type="tae")
    with pytest.raises(InvalidRequest, match="vae_type"):
        run(prompts="a red circle", init_cache=True)
    run.shutdown()


def test_a_size_that_the_server_does_not_have_is_named(server: str) -> None:
    run = CausalForcingPipeline(server=server, height=480, width=832)
    with pytest.raises(VideoServiceError) as refused:
        run(prompts="a red circle", init_cache=True)
    assert refused.value.reason == "UNSUPPORTED_RESOLUTION"
    run.shutdown()


def _call_often(run: CausalForcingPipeline) -> None:
    for _ in range(4):  # some chunks are under way already
        run(prompts="a red circle", init_cache=False)


def _eventually(backends: FakeBackends) -> list[str]:
    """Return what was called once the session has left."""
    import asyncio

    asyncio.run(asyncio.wait_for(_left(backends), 30))
    return backends.events


async def _left(backends: FakeBackends) -> None:
    import asyncio

    while "leave" not in backends.events:  # noqa: ASYNC110  (set on another thread's event loop)
        await asyncio.sleep(0.01)
