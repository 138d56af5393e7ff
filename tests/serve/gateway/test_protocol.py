"""What a client may say when."""

from __future__ import annotations

import pytest

from causal_forcing.errors import CausalForcingError, NoCapacity
from causal_forcing.prompts import PromptUpdate
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.gateway.protocol import Conversation, MessageRate
from serve.messages import Credit
from serve.session_request import SessionRequest
from tests.serve.fakes import simulated

PROMPT = pb.PromptUpdate(prompts=[pb.WeightedPrompt(text="a fox")])
CONFIG = pb.StreamVideoRequest(config=pb.SessionConfig(prompt=PROMPT))
SNOW = pb.StreamVideoRequest(prompt=PROMPT)
PING = pb.StreamVideoRequest(ping=pb.Ping(nonce=3))
END = pb.StreamVideoRequest(end=pb.End())
PAUSE = pb.StreamVideoRequest(pause=pb.Pause())
RESUME = pb.StreamVideoRequest(resume=pb.Resume())
KEYFRAME = pb.StreamVideoRequest(request_keyframe=pb.RequestKeyframe())
FROM_THE_FUTURE = pb.StreamVideoRequest.FromString(b"\xfa\x3e\x00")


def ack(chunk: int) -> pb.StreamVideoRequest:
    return pb.StreamVideoRequest(ack=pb.Ack(chunk_index=chunk))


EVERYTHING = {
    "config": CONFIG,
    "prompt": SNOW,
    "ack": ack(0),
    "ping": PING,
    "end": END,
    "pause": PAUSE,
    "resume": RESUME,
    "request_keyframe": KEYFRAME,
}
NOT_CONFIG = [kind for kind in EVERYTHING if kind != "config"]
EMPTY_PROMPT = pb.StreamVideoRequest(prompt=pb.PromptUpdate())

ILLEGAL = [
    *(pytest.param([EVERYTHING[kind]], "CONFIG_NOT_FIRST", "", id=f"{kind} first") for kind in NOT_CONFIG),
    *(
        pytest.param([FROM_THE_FUTURE, EVERYTHING[kind]], "CONFIG_NOT_FIRST", "", id=f"unknown, then {kind}")
        for kind in NOT_CONFIG
    ),
    *(
        pytest.param([CONFIG, EVERYTHING[kind], CONFIG], "CONFIG_REPEATED", "", id=f"config after {kind}")
        for kind in NOT_CONFIG
        if kind != "end"
    ),
    pytest.param([CONFIG, CONFIG], "CONFIG_REPEATED", "", id="config twice"),
    pytest.param([CONFIG, FROM_THE_FUTURE, CONFIG], "CONFIG_REPEATED", "", id="config after unknown"),
    pytest.param([CONFIG, ack(3)], "INVALID_ACK", "ack.chunk_index", id="ack of a chunk that was not sent"),
    pytest.param([CONFIG, ack(-1)], "INVALID_ACK", "ack.chunk_index", id="negative ack"),
    pytest.param([CONFIG, ack(2), ack(1)], "INVALID_ACK", "ack.chunk_index", id="ack goes back"),
    pytest.param([CONFIG, PAUSE, ack(2), RESUME, ack(1)], "INVALID_ACK", "ack.chunk_index", id="even over a pause"),
    pytest.param([pb.StreamVideoRequest(config=pb.SessionConfig())], "INVALID_PROMPT", "prompt", id="no prompt"),
    pytest.param([CONFIG, EMPTY_PROMPT], "INVALID_PROMPT", "prompts", id="empty prompt"),
    pytest.param([CONFIG, PAUSE, EMPTY_PROMPT], "INVALID_PROMPT", "prompts", id="empty prompt in a pause"),
]


@pytest.mark.parametrize(("messages", "reason", "field"), ILLEGAL)
def test_illegal_orders_are_refused_by_name(messages: list[pb.StreamVideoRequest], reason: str, field: str) -> None:
    conversation = Conversation(simulated())
    conversation.sent_chunk = 2
    for message in messages[:-1]:
        conversation.receive(message)
    with pytest.raises(CausalForcingError) as caught:
        conversation.receive(messages[-1])
    assert caught.value.reason == reason
    assert caught.value.metadata.get("field", "") == field


def test_a_refused_config_leaves_the_conversation_unconfigured() -> None:
    conversation = Conversation(simulated())
    with pytest.raises(CausalForcingError):
        conversation.receive(pb.StreamVideoRequest(config=pb.SessionConfig()))
    with pytest.raises(CausalForcingError) as caught:
        conversation.receive(PING)
    assert caught.value.reason == "CONFIG_NOT_FIRST"


def test_legal_messages_become_events() -> None:
    conversation = Conversation(simulated())
    assert conversation.receive(FROM_THE_FUTURE) is None
    assert isinstance(conversation.receive(CONFIG), SessionRequest)
    conversation.sent_chunk = 5
    assert conversation.receive(ack(4)) == Credit(4)
    assert conversation.receive(ack(4)) == Credit(4)
    assert conversation.receive(PING) == pb.Ping(nonce=3)
    for message in (PAUSE, PAUSE, RESUME, RESUME, KEYFRAME, PING):  # each may come at any time, and again
        kind = message.WhichOneof("message")
        assert kind is not None
        assert conversation.receive(message) == getattr(message, kind)
    assert conversation.receive(FROM_THE_FUTURE) is None
    assert isinstance(conversation.receive(END), pb.End)


def test_the_table_knows_every_message() -> None:
    assert list(EVERYTHING) == [field.name for field in pb.StreamVideoRequest.DESCRIPTOR.oneofs[0].fields]


def test_messages_have_a_rate() -> None:
    rate = MessageRate(per_s=10, now_s=0.0)
    for _ in range(20):
        rate.count(0.0)
    with pytest.raises(NoCapacity) as caught:
        rate.count(0.05)
    assert caught.value.reason == "TOO_MANY_MESSAGES"
    for second in range(1, 100):
        for _ in range(10):
            rate.count(float(second))


def test_a_flood_is_stopped() -> None:
    conversation = Conversation(simulated(limits={"max_messages_per_s": 0.001}))
    with pytest.raises(NoCapacity):
        conversation.receive(CONFIG)


def test_prompts_without_a_name_are_numbered() -> None:
    conversation = Conversation(simulated())
    first = conversation.receive(CONFIG)
    second, third = conversation.receive(SNOW), conversation.receive(SNOW)
    assert isinstance(first, SessionRequest)
    assert isinstance(second, PromptUpdate)
    assert isinstance(third, PromptUpdate)
    assert [first.prompt.prompt_id, second.prompt_id, third.prompt_id] == ["prompt-0", "prompt-1", "prompt-2"]
