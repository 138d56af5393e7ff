"""No frame, prompt, ack or event of one session reaches another, while many run at once on one decoder."""

from __future__ import annotations

import asyncio
import zlib

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.codecs.frames import Codec, decode_frame
from serve.gateway.inputs import StreamInput
from serve.gateway.session import LiveSession
from serve.simulated import mark
from tests.serve.fakes import Client, FakeBackends, play

SESSIONS = 12
CHUNKS = 6


def mark_of(text: str) -> int:
    """Return what the simulated generator paints for a prompt."""
    key = f"{zlib.crc32(text.encode()):08x}"
    return mark(zlib.crc32(key.encode())) % 256


async def one(backends: FakeBackends, number: int) -> list[pb.StreamVideoResponse]:
    """Run a session of its own seed, prompts and ids, with a switch in the middle."""
    client = Client()
    client.config(f"first {number}", seed=10 * number + 1, codec="FRAME_CODEC_RAW_RGB24")

    def on_message(message: pb.StreamVideoResponse) -> None:
        frame = message.frame
        if not frame.last_in_chunk:
            return
        if frame.chunk_index == 1:
            client.prompt(f"second {number}", prompt_id=f"second-{number}")
        if frame.chunk_index >= CHUNKS and frame.prompt_id != "first":
            client.send(ping=pb.Ping(nonce=number))
            client.send(end=pb.End())
        else:
            client.ack(frame.chunk_index)

    session = LiveSession(f"session-{number}", backends.service, backends, StreamInput(client, backends.service))
    return await play(session, client, on_message)


async def test_sessions_that_run_at_once_see_only_themselves() -> None:
    backends = FakeBackends()
    async with asyncio.timeout(60):
        all_heard = await asyncio.gather(*(one(backends, number) for number in range(SESSIONS)))
    for number, heard in enumerate(all_heard):
        assert [message.sequence for message in heard] == list(range(len(heard)))
        texts = {"first": f"first {number}", f"second-{number}": f"second {number}"}
        frames = [message.frame for message in heard if message.HasField("frame")]
        assert {frame.prompt_id for frame in frames} == set(texts)
        for frame in frames:
            seen = tuple(map(int, decode_frame(Codec.RAW_RGB24, frame.data, 64, 64)[0, 0]))
            assert seen == (mark(10 * number + 1) % 256, frame.chunk_index, mark_of(texts[frame.prompt_id]))
        applied = [message.prompt_applied.prompt_id for message in heard if message.HasField("prompt_applied")]
        assert applied == list(texts)
        assert heard[-1].HasField("session_ended")
        started = next(message.session_started for message in heard if message.HasField("session_started"))
        assert started.session_id == f"session-{number}"
    assert backends.is_clean
