"""A chunk on its way to the client: what is asked for while it is being decoded."""

from __future__ import annotations

from typing import Any

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.access.usage import Spent
from serve.gateway.delivery import Delivery
from serve.gateway.outbox import Outbox
from serve.gateway.requests import parse_config
from serve.gateway.session_meter import SessionMeter
from serve.messages import Decoded, GeneratedChunk
from tests.serve.fakes import chunk, simulated


class Link:
    """A decoder during whose work on one chunk the client asks for a keyframe."""

    def __init__(self, asked_in: int) -> None:
        self.delivery: Delivery | None = None
        self.keyframes: list[bool] = []
        self._asked_in = asked_in

    async def decode(
        self, chunk: GeneratedChunk, *, first_frame: int = 0, encode: bool = True, keyframe: bool = False
    ) -> Decoded:
        self.keyframes.append(keyframe)
        if chunk.index == self._asked_in and self.delivery is not None:
            self.delivery.request_keyframe()
        return Decoded("d", ())


async def test_a_keyframe_that_is_asked_for_while_a_chunk_is_decoded_comes_with_the_next() -> None:
    prompt = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="a fox")])
    request = parse_config(pb.SessionConfig(prompt=prompt), simulated())
    link: Any = Link(asked_in=1)
    no_feed: Any = None
    link.delivery = delivery = Delivery(request, link, no_feed, Outbox(), spent=Spent(), meter=SessionMeter())
    delivery.request_keyframe()
    for index in range(4):
        await delivery.deliver(chunk(index))
    assert link.keyframes == [True, False, True, False]
