"""Decoders and text encoders whose devices fail, hang or make nonsense: who is told, and what is never shown."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from causal_forcing.config import VaeConfig
from causal_forcing.errors import DeviceFault, InvalidRequest, NonFiniteOutput
from causal_forcing.geometry import Geometry
from causal_forcing.vae import WanVae
from serve.codecs.frames import Codec, FrameFormat
from serve.config import ServiceConfig
from serve.device import DEVICE_FAULTS, Warden
from serve.engines import load_decoder, load_text
from serve.errors import Unavailable
from serve.gateway import backends
from serve.gateway.backends import _insist
from serve.messages import Decoded, DecodeRequest, PackedEmbedding, PackedTensor, Process
from serve.metrics import SILENT
from serve.model_engines import ModelStream
from serve.status import FailedElsewhere, Failure, failure_of
from serve.text_encoder import TextEncoder
from serve.vae_decoder import DecoderService, VaeDecoder
from tests.serve.fakes import chunk, simulated

CAUSES = {"nan": "NON_FINITE_OUTPUT", "oom": "OUT_OF_MEMORY", "cuda": "DEVICE_FAULT", "hang": "DEVICE_HUNG"}
HERE = Process("replica-1", 1, "node")
FAULT = failure_of(DeviceFault("cuda"))


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Path]:
    """A folder for faults; a step that hangs ends when it goes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def faulty(folder: Path) -> ServiceConfig:
    return simulated(simulated={"chunk_ms": 0, "fault_dir": str(folder)})


def decoder_replica(config: ServiceConfig, ended: list[str]) -> VaeDecoder:
    """Return a replica as Serve would start it, but for the process around it."""
    replica = object.__new__(VaeDecoder)
    replica._model, replica._process = config.model_key, HERE
    replica._warden = Warden(ThreadPoolExecutor(1), 0.1, end=lambda: ended.append("end"))
    replica._service = DecoderService(load_decoder(config), HERE.replica_id, 1 << 30, replica._warden)
    return replica


def text_replica(config: ServiceConfig, ended: list[str]) -> TextEncoder:
    replica = object.__new__(TextEncoder)
    replica._model, replica._process = config.model_key, HERE
    replica._warden = Warden(ThreadPoolExecutor(1), 0.1, end=lambda: ended.append("end"))
    replica._engine, replica._recorder = load_text(config), SILENT
    return replica


def request(config: ServiceConfig, index: int = 0, session: str = "s") -> DecodeRequest:
    size = Geometry(16, 16)
    latents = chunk(index).latents
    raw = FrameFormat(Codec.RAW_RGB24)
    return DecodeRequest("", session, index, latents, index == 0, size.height, size.width, raw, model=config.model_key)


@pytest.mark.parametrize("fault", CAUSES)
async def test_a_decoders_device_fault_is_told_and_the_replica_ends_itself(fault: str, planted: Path) -> None:
    config, ended = faulty(planted), list[str]()
    replica = decoder_replica(config, ended)
    good = await replica.decode(request(config))
    assert isinstance(good, Decoded)
    assert (good.frames is not None, good.process) == (True, HERE)
    await replica.check_health()
    (planted / f"decoder-{fault}").touch()
    answer = await replica.decode(request(config, 1))
    assert isinstance(answer, Failure)
    assert (answer.code, answer.reason, answer.metadata["cause"]) == ("UNAVAILABLE", "DEVICE_FAULT", CAUSES[fault])
    assert ended == ["end"]
    with pytest.raises(RuntimeError, match="not to be trusted"):
        await replica.check_health()
    other = asyncio.create_task(replica.decode(request(config, 0, "other")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not other.done(), "nothing comes from a device that has failed"


@pytest.mark.parametrize("fault", CAUSES)
async def test_a_text_encoders_device_fault_is_told_and_the_replica_ends_itself(fault: str, planted: Path) -> None:
    config, ended = faulty(planted), list[str]()
    replica = text_replica(config, ended)
    assert isinstance((await replica.encode_all(["a fox"]))[0], PackedEmbedding)
    await replica.check_health()
    (planted / f"text-{fault}").touch()
    error, same = await replica.encode_all(["a fox", "a dog"])
    assert isinstance(error, DEVICE_FAULTS)
    assert same is error
    answer = failure_of(error)
    assert (answer.code, answer.reason, answer.metadata["cause"]) == ("UNAVAILABLE", "DEVICE_FAULT", CAUSES[fault])
    assert "fox" not in str(answer)
    assert ended == ["end"]
    with pytest.raises(RuntimeError, match="not to be trusted"):
        await replica.check_health()


class BrokenVae:
    """A decoder of which one weight is NaN."""

    min_frame_bytes = 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.vae = WanVae(VaeConfig(base_dim=4)).eval()
        weight = next(p for name, p in self.vae.named_parameters() if "decoder" in name)
        weight.data.fill_(float("nan"))

    def open(self, height: int, width: int) -> ModelStream:
        return ModelStream(self.vae, self.vae.new_decoder_state(Geometry(height, width)))

    def encode_image(self, frame: Any) -> PackedTensor:
        raise NotImplementedError


async def test_pixels_that_are_not_finite_are_never_shown() -> None:
    service = DecoderService(BrokenVae(), "d", 1 << 30, Warden(ThreadPoolExecutor(1), 60.0, end=lambda: None))
    latents = PackedTensor.pack(torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(1)))
    raw = FrameFormat(Codec.RAW_RGB24)
    with pytest.raises(NonFiniteOutput):
        await service.decode(DecodeRequest("", "s", 0, latents, True, 16, 16, raw))
    assert service.counts.decoded == 0


def answers(*script: object) -> Callable[[int], Awaitable[Any]]:
    """Return calls that are answered so, one after another; errors are raised."""
    left = list(script)

    async def call(_: int) -> object:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "RETRY_S", 0.0)


async def test_one_fault_is_not_the_end_and_two_are() -> None:
    assert await _insist(answers(FAULT, "frames"), "the decoder", "DECODER_LOST") == "frames"
    assert await _insist(answers(FAULT, ActorDiedError(), "frames"), "the decoder", "DECODER_LOST") == "frames"
    with pytest.raises(FailedElsewhere) as caught:
        await _insist(answers(FAULT, ActorDiedError(), FAULT), "the decoder", "DECODER_LOST")
    assert caught.value.failure is FAULT


async def test_replicas_that_die_again_and_again_are_lost_and_a_bad_request_is_not_repeated() -> None:
    with pytest.raises(Unavailable) as lost:
        await _insist(answers(*[ActorDiedError()] * 4), "the decoder", "DECODER_LOST")
    assert lost.value.reason == "DECODER_LOST"
    bad = failure_of(InvalidRequest("start_image", "...", "must be an image"))
    with pytest.raises(FailedElsewhere) as caught:
        await _insist(answers(bad), "the decoder", "DECODER_LOST")
    assert caught.value.failure is bad
