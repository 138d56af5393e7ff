"""The pipeline as the client of a server: the gateway's session on a port of this machine."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from causal_forcing.errors import InvalidRequest, NoCapacity
from causal_forcing.prompts import PromptUpdate
from causal_forcing.scope.pipeline import CausalForcingPipeline
from causal_forcing.scope.requests import RefusedPrompt
from serve.access.guard import OpenGuard
from serve.client import VideoServiceError
from serve.errors import ClientGone
from serve.gateway.inputs import StreamInput
from serve.gateway.session import LiveSession
from tests.serve import server as testing_server
from tests.serve.fakes import LOST, Client, FakeBackends
from tests.serve.server import serving_in_background


@pytest.fixture
def backends() -> FakeBackends:
    return FakeBackends()


@pytest.fixture
def server(backends: FakeBackends) -> Iterator[str]:
    with serving_in_background(backends) as address:
        yield address


class Strict(OpenGuard):
    """Refuses a prompt while the session runs."""

    async def check(self, update: PromptUpdate) -> None:
        if update.prompts[0].text == "forbidden":
            raise NoCapacity("one prompt a minute", reason="QUOTA_EXCEEDED", metadata={"retry_after_s": "60"})


@pytest.fixture
def strict_server(backends: FakeBackends, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    def open_session(backends: FakeBackends, client: Client, name: str) -> LiveSession:
        service = backends.service
        return LiveSession(name, service, backends, StreamInput(client, service), Strict())

    monkeypatch.setattr(testing_server, "open_session", open_session)
    with serving_in_background(backends) as address:
        yield address


def sessions(backends: FakeBackends) -> int:
    """Return how many sessions have had a generator."""
    return len([event for event in backends.events if event.startswith("confirm")])


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
    assert sessions(backends) == 1
    run.shutdown()


def test_another_seed_needs_another_session(server: str, backends: FakeBackends) -> None:
    run = load(server)
    run(prompts="a red circle", init_cache=True)
    run(prompts="a red circle", init_cache=True, base_seed=7)
    assert sessions(backends) == 2
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


def test_a_vae_that_the_server_does_not_have_is_refused_as_often_as_it_is_asked_for(server: str) -> None:
    run = load(server, vae_type="tae")
    for init_cache in (True, False):
        with pytest.raises(InvalidRequest, match="vae_type"):
            run(prompts="a red circle", init_cache=init_cache)
    run.shutdown()


def test_a_size_that_the_server_does_not_have_is_named(server: str) -> None:
    run = CausalForcingPipeline(server=server, height=480, width=832)
    with pytest.raises(InvalidRequest) as refused:
        run(prompts="a red circle", init_cache=True)
    assert refused.value.reason == "UNSUPPORTED_RESOLUTION"
    assert refused.value.metadata["field"] == "height"
    run.shutdown()


def test_a_picture_that_the_server_refuses_is_forgotten(server: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    run = load(server)
    run(prompts="a red circle", init_cache=True)
    with pytest.raises(InvalidRequest, match="start_image"):
        run(prompts="a red circle", init_cache=True, first_frame_image=str(path))
    assert run(prompts="a red circle", init_cache=False)["video"].shape == (1, 64, 64, 3)
    assert run(prompts="a red circle", init_cache=True)["video"].shape == (1, 64, 64, 3)
    run.shutdown()


def test_a_refused_prompt_is_an_error_once_and_the_stream_goes_on(strict_server: str, backends: FakeBackends) -> None:
    run = load(strict_server)
    run(prompts="a red circle", init_cache=True)
    with pytest.raises(RefusedPrompt, match="one prompt a minute") as refused:
        _call_until_it_fails(run, prompts="forbidden")
    assert (refused.value.reason, refused.value.retry_after_s) == ("QUOTA_EXCEEDED", 60)
    for _ in range(3):
        assert run(prompts="forbidden", init_cache=False)["video"].shape == (4, 64, 64, 3)
    assert sessions(backends) == 1
    run.shutdown()


def test_a_reset_whose_prompt_is_refused_leaves_the_scene_as_it_was(strict_server: str, backends: FakeBackends) -> None:
    run = load(strict_server)
    run(prompts="a red circle", init_cache=True)
    with pytest.raises(RefusedPrompt, match="one prompt a minute"):
        run(prompts="forbidden", init_cache=True)
    run(prompts="forbidden", init_cache=False)  # the rest of a chunk of which some frames had come
    assert run(prompts="forbidden", init_cache=False)["video"].shape == (4, 64, 64, 3)
    assert sessions(backends) == 1
    run.shutdown()


@pytest.mark.parametrize("reason", ["CLIENT_TOO_SLOW", "CLIENT_SILENT"])
def test_a_session_that_has_expired_is_followed_by_another_in_the_same_call(
    server: str, backends: FakeBackends, reason: str
) -> None:
    run = load(server)
    run(prompts="a red circle", init_cache=True)
    backends.decode_failures.append(ClientGone("nobody asked for more", reason=reason))
    _call_often(run)
    assert sessions(backends) == 2
    run.shutdown()


def test_a_pipeline_that_is_let_go_of_gives_the_generator_back(server: str, backends: FakeBackends) -> None:
    run = load(server)
    run(prompts="a red circle", init_cache=True)
    del run
    gc.collect()
    assert "leave" in _eventually(backends)
    assert "video-client" not in [thread.name for thread in threading.enumerate()]


def _call_until_it_fails(run: CausalForcingPipeline, **parameters: Any) -> None:
    while True:  # chunks that are under way come first
        run(init_cache=False, **parameters)


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
