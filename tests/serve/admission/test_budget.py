"""What a generator has for sessions, and that admission counts it."""

from __future__ import annotations

import pytest

from causal_forcing.errors import InvalidRequest
from causal_forcing.weights.memory import RESERVE_BYTES
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.admission.budget import session_budget
from serve.admission.claims import claim, generator_bytes
from serve.admission.desk import AdmissionDesk
from serve.admission.reporter import Reporter
from serve.config import ServiceConfig, load_config
from serve.engines import load_generator
from serve.gateway.requests import parse_config
from serve.messages import Claim, Share
from tests.serve.admission.test_actor import Remote, actor, granted, next_place  # noqa: F401  (actor is a fixture)
from tests.serve.fakes import simulated


def of(service: ServiceConfig, session_id: str = "usual", **fields: int) -> Claim:
    """Return the claim of a session."""
    prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="a fox")])
    return claim(session_id, parse_config(pb.SessionConfig(prompt=prompt, **fields), service), Share(), service)


@pytest.mark.parametrize("places", [1, 3])
def test_a_device_of_a_given_size_holds_the_sessions_that_the_configuration_allows(places: int) -> None:
    service = load_config(None, generator={"memory_bytes": 1 << 30, "sessions_per_replica": places})
    largest = generator_bytes(service, service.model_preset.session_config())
    budget = session_budget(service)
    assert budget is not None
    assert budget == (1 << 30) - service.generator_memory(0).total_bytes - RESERVE_BYTES
    assert budget >= places * largest


def test_otherwise_the_device_says_what_is_free_when_the_engine_is_warm() -> None:
    service = load_config(None)
    load_generator(service)
    measured = session_budget(service)
    assert measured is not None
    assert measured >= generator_bytes(service, service.model_preset.session_config())
    free = session_budget(service, free=lambda device: RESERVE_BYTES + (1 << 30))
    assert free is not None
    assert 0 < (1 << 30) - free < 64 << 20, "a chunk needs something while it is made"
    assert session_budget(service, free=lambda device: 1 << 20) == 0
    assert session_budget(simulated()) is None


async def test_a_session_that_asks_for_more_than_a_generator_has_is_refused(actor: Remote) -> None:  # noqa: F811
    service = load_config(None, max_window_frames=200)
    usual, large = of(service), of(service, "large", window_frames=200)
    generator = Reporter(actor, "g1", capacity=2, budget_bytes=usual.nbytes)
    generator.start()
    desk = AdmissionDesk(actor, "gw")
    await generator.remove("nothing")
    with pytest.raises(InvalidRequest) as caught:
        await next_place(desk.places(large))
    assert caught.value.reason == "SESSION_TOO_LARGE"
    assert f"{usual.nbytes} bytes" in caught.value.message
    assert await granted(desk.places(usual)) == "g1"
    desk.close()


async def test_a_session_that_waited_for_the_first_generator_hears_that_it_is_too_small(actor: Remote) -> None:  # noqa: F811
    service = load_config(None, max_window_frames=200)
    usual, large = of(service), of(service, "large", window_frames=200)
    desk = AdmissionDesk(actor, "gw")
    places = desk.places(large)
    assert (await next_place(places)).most_bytes is None
    Reporter(actor, "g1", capacity=1, budget_bytes=usual.nbytes).start()
    with pytest.raises(InvalidRequest) as caught:
        await granted(places)
    assert caught.value.reason == "SESSION_TOO_LARGE"
    desk.close()
