"""Replicas of a version with another model make nothing for the gateways of the version before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ray.exceptions import RpcError

from serve.admission import succession
from serve.admission.succession import refusal
from serve.codecs.frames import Codec, FrameFormat
from serve.generator import Generator
from serve.messages import DecodeRequest, EncodeImage, LeaseEnded
from serve.status import Failure
from serve.text_encoder import TextEncoder
from serve.vae_decoder import VaeDecoder
from tests.serve.fakes import chunk, simulated
from tests.serve.test_generator import Bench

OURS, THEIRS = simulated().model_key, simulated(preset="causal-forcing-framewise").model_key


def is_draining(answer: object) -> bool:
    assert isinstance(answer, Failure), answer
    assert answer.retry_after_s is not None
    return (answer.code, answer.reason) == ("UNAVAILABLE", "REPLICA_DRAINING")


def test_a_change_that_is_not_of_the_model_refuses_nobody() -> None:
    assert refusal(simulated(limits={"max_queued_sessions": 3}).model_key, OURS) is None
    assert is_draining(refusal(simulated(vae="lightvae").model_key, OURS))


async def test_a_decoder_of_another_model_makes_no_frames() -> None:
    decoder = object.__new__(VaeDecoder)
    decoder._model = OURS
    request = DecodeRequest("", "s", 0, chunk(0).latents, True, 16, 16, FrameFormat(Codec.RAW_RGB24), model=THEIRS)
    assert is_draining(await decoder.decode(request))
    assert is_draining(await decoder.encode_image(EncodeImage(b"", 16, 16, model=THEIRS)))


async def test_a_text_encoder_of_another_model_encodes_nothing() -> None:
    encoder = object.__new__(TextEncoder)
    encoder._model = OURS
    assert is_draining(await encoder.encode("a fox", THEIRS))


async def test_a_generator_of_another_model_takes_no_lease() -> None:
    generator = object.__new__(Generator)
    generator._model = OURS
    events = [event async for event in generator.lease(replace(Bench().request, model=THEIRS))]
    assert len(events) == 1
    assert isinstance(events[0], LeaseEnded)
    assert is_draining(events[0].failure)


class Store:
    """Ray's control store, as it is and while it is away."""

    def __init__(self) -> None:
        self.entries: dict[tuple[bytes, bytes], bytes] = {}
        self.is_down = False

    def get(self, key: bytes, namespace: bytes) -> bytes | None:
        if self.is_down:
            raise RpcError("unavailable")
        return self.entries.get((namespace, key))

    def put(self, key: bytes, value: bytes, *, overwrite: bool, namespace: bytes) -> None:
        assert overwrite
        self.entries[namespace, key] = value


def test_the_version_that_was_announced_last_is_in_service(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(succession, "_internal_kv_get", store.get)
    monkeypatch.setattr(succession, "_internal_kv_put", store.put)
    assert succession.is_current("app", "a"), "nothing is known"
    succession.announce("app", "a")
    succession.announce("another app", "x")
    assert succession.is_current("app", "a")
    succession.announce("app", "b")
    assert (succession.is_current("app", "a"), succession.is_current("app", "b")) == (False, True)
    succession.announce("app", "a")
    assert succession.is_current("app", "a"), "it was rolled back"
    succession.announce("app", "b")
    store.is_down = True
    assert succession.is_current("app", "a"), "nobody is sent away while nobody knows"
