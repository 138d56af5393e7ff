"""A client built from the first released protocol keeps working: it has only that descriptor, and ignores the rest."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tests.serve.fakes import FakeBackends
from tests.serve.server import serving

FIRST = Path(__file__).with_name("first_protocol.binpb")
"""FileDescriptorSet of protos/causal_forcing/v1/video.proto as of commit 2ded8e9, with its imports."""

CALL = "/causal_forcing.v1.VideoService/StreamVideo"


def first_messages() -> tuple[Any, Any]:
    """Return the request's and the response's class as they were then."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(FIRST.read_bytes()).file:
        pool.Add(file)
    names = ("StreamVideoRequest", "StreamVideoResponse")
    found = [pool.FindMessageTypeByName(f"causal_forcing.v1.{name}") for name in names]
    request, response = (message_factory.GetMessageClass(descriptor) for descriptor in found)
    return request, response


async def test_the_first_client_streams_switches_its_prompt_and_ends() -> None:
    request, response = first_messages()
    assert "pause" not in {field.name for field in request.DESCRIPTOR.fields}
    backends, heard = FakeBackends(), []
    async with asyncio.timeout(30), serving(backends) as address, grpc.aio.insecure_channel(address) as channel:
        stream = channel.stream_stream(
            CALL, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        call = stream()
        prompt = {"prompts": [{"text": "a fox"}], "prompt_id": "fox"}
        await call.write(request(config={"prompt": prompt, "seed": 3, "codec": "FRAME_CODEC_JPEG"}))
        async for message in call:
            heard.append(message)
            if message.frame.last_in_chunk:
                await call.write(request(ack={"chunk_index": message.frame.chunk_index}))
                if message.frame.chunk_index == 1:
                    await call.write(request(prompt={"prompts": [{"text": "snow"}], "prompt_id": "snow"}))
                if message.frame.prompt_id == "snow":
                    await call.write(request(end={}))
                    await call.done_writing()
                    break
        rest = [message async for message in call]
        assert await call.code() is grpc.StatusCode.OK
    heard += rest
    assert [message.sequence for message in heard] == list(range(len(heard)))
    frames = [message.frame for message in heard if message.HasField("frame")]
    assert [frame.frame_index for frame in frames] == list(range(len(frames)))
    assert frames[0].data[:2] == b"\xff\xd8"
    assert heard[-1].HasField("session_ended")
    assert backends.is_clean
