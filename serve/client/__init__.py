"""Clients of the service: :class:`AsyncVideoClient` and :class:`VideoClient`.

    with VideoClient("127.0.0.1:9000") as client, client.stream(StreamOptions(prompt="a red fox runs")) as session:
        for event in session:
            if isinstance(event, Frame):
                show(event.pixels())

Needs grpcio and protobuf; :meth:`Frame.pixels` needs Pillow and numpy as well. Neither torch nor ray.
"""

from .aio import AsyncVideoClient, AsyncVideoSession
from .blocking import VideoClient, VideoSession
from .errors import VideoServiceError
from .events import (
    ChunkTimings,
    Ended,
    Ending,
    Event,
    Frame,
    FramesDropped,
    Moved,
    PromptApplied,
    PromptRefused,
    Queued,
    Started,
    StreamOptions,
)

__all__ = [
    "AsyncVideoClient",
    "AsyncVideoSession",
    "ChunkTimings",
    "Ended",
    "Ending",
    "Event",
    "Frame",
    "FramesDropped",
    "Moved",
    "PromptApplied",
    "PromptRefused",
    "Queued",
    "Started",
    "StreamOptions",
    "VideoClient",
    "VideoServiceError",
    "VideoSession",
]
