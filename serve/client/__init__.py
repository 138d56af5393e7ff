"""Clients of the service: :class:`AsyncVideoClient` and :class:`VideoClient`.

    with VideoClient("127.0.0.1:9000") as client, client.stream(StreamOptions(prompt="a red fox runs")) as session:
        for event in session:
            if isinstance(event, Frame):
                show(event.pixels())

``stream`` opens a session, ``keep_streaming`` one that is followed by a new one when it is lost, ``generate`` a video
of a given length; ``get_model``, ``get_session`` and, for operators, ``list_sessions`` and ``end_session`` ask and
tell.

Needs grpcio and protobuf; :meth:`Frame.pixels` needs Pillow and numpy as well. Neither torch nor ray.
"""

from .aio import AsyncVideoClient
from .blocking import Video, VideoClient, VideoSession
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
    Reconnecting,
    SessionInfo,
    Started,
    StreamOptions,
)
from .reconnect import AsyncReconnectingSession, Retry
from .session import AsyncVideo, AsyncVideoSession

__all__ = [
    "AsyncReconnectingSession",
    "AsyncVideo",
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
    "Reconnecting",
    "Retry",
    "SessionInfo",
    "Started",
    "StreamOptions",
    "Video",
    "VideoClient",
    "VideoServiceError",
    "VideoSession",
]
