"""docs/api.md names everything that a client can send, hear, ask for or be refused with."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import EnumDescriptor

from protos.causal_forcing.v1 import video_pb2 as pb

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "api.md").read_text()
PROTO = (ROOT / "protos" / "causal_forcing" / "v1" / "video.proto").read_text()
TRANSCRIPT = [line.removeprefix("//") for line in PROTO.partition("\nsyntax")[0].splitlines()]

NOT_FOR_CLIENTS = {
    "BAD_CHECKPOINT",  # a replica that does not start
    "CLUSTER_LOST",  # operators' commands
    "DEVICE_HUNG",  # told as DEVICE_FAULT, as are the next two
    "NON_FINITE_OUTPUT",
    "OUT_OF_MEMORY",
    "MAILBOX_LOST",  # the session's own process died, which nobody can be told
    "RAY_NOT_STARTED",
    "SEQUENCE_GAP",  # the client's own
    "SESSION_ENDED",
}


def named(name: str) -> bool:
    return re.search(rf"\b{name}\b", DOCUMENT) is not None


def test_every_call_message_and_field_is_named() -> None:
    service = pb.DESCRIPTOR.services_by_name["VideoService"]
    assert [method.name for method in service.methods if not named(method.name)] == []
    for message in (pb.StreamVideoRequest, pb.StreamVideoResponse):
        kinds = [field.message_type.name for field in message.DESCRIPTOR.oneofs_by_name["message"].fields]
        assert [kind for kind in kinds if not named(kind)] == []
    assert [field.name for field in pb.SessionConfig.DESCRIPTOR.fields if not named(field.name)] == []


@pytest.mark.parametrize("enum", [pb.SwitchPolicy.DESCRIPTOR, pb.Pacing.DESCRIPTOR, pb.SlowClientPolicy.DESCRIPTOR])
def test_every_choice_is_named(enum: EnumDescriptor) -> None:
    assert [value.name for value in enum.values if value.number and not named(value.name)] == []


def test_every_reason_of_the_service_is_named() -> None:
    sources = [path for path in (ROOT / "serve").rglob("*.py") if path.parent.name != "observe"]
    text = "\n".join(path.read_text() for path in sources)
    reasons = set(re.findall(r'reason(?:: ClassVar\[str\])? ?= ?"([A-Z_]+)"', text))
    assert len(reasons) > 15
    assert sorted(reason for reason in reasons - NOT_FOR_CLIENTS if not named(reason)) == []


def test_the_transcript_shows_every_kind_of_message() -> None:
    shown = set(re.findall(r"^   (?:C   |S \d+) +(\w+) \{", "\n".join(TRANSCRIPT), re.MULTILINE))
    kinds = {
        field.name
        for message in (pb.StreamVideoRequest, pb.StreamVideoResponse)
        for field in message.DESCRIPTOR.oneofs_by_name["message"].fields
    }
    assert shown == kinds


def test_sequence_numbers_in_the_transcript_rise_by_what_is_shown() -> None:
    """A chunk's frames are four messages, of which the transcript may show the first alone."""
    numbers = [int(number) for number in re.findall(r"^   S (\d+) ", "\n".join(TRANSCRIPT), re.MULTILINE)]
    beginnings = [index for index, number in enumerate(numbers) if not number or numbers[index - 1] + 100 < number]
    steps = {later - earlier for earlier, later in itertools.pairwise(numbers) if 0 < later - earlier < 100}
    assert len(beginnings) >= 3
    assert steps <= {1, 3, 4}
