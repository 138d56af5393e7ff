"""From a generator's chunk to what the client is sent: decoded, timed, and sent or dropped."""

from __future__ import annotations

import time
from collections import deque

from serve.access.usage import Spent
from serve.messages import Decoded, GeneratedChunk
from serve.session_request import SessionRequest

from .decoding import DecoderLink
from .outbox import ChunkCosts, Outbox
from .prompt_feed import PromptFeed
from .session_meter import SessionMeter


class Delivery:
    """One session's chunks on their way to its client.

    Attributes:
        last_sent: Highest chunk whose frames were sent.
        is_complete: Whether the video has the length, or the bytes, that were asked for.
    """

    def __init__(
        self,
        request: SessionRequest,
        link: DecoderLink,
        feed: PromptFeed,
        outbox: Outbox,
        *,
        spent: Spent,
        meter: SessionMeter,
    ) -> None:
        self._spent = spent
        self._meter = meter
        self._request = request
        self._link = link
        self._feed = feed
        self._outbox = outbox
        self._unacked: deque[int] = deque()
        self._keyframe = False
        self.last_sent = -1
        self.is_complete = False

    @property
    def has_credit(self) -> bool:
        """Whether another chunk may be sent."""
        return self._request.goal is not None or len(self._unacked) < self._request.credit_chunks

    def acked(self, chunk: int) -> None:
        """Note that the client is finished with every chunk up to this one."""
        while self._unacked and self._unacked[0] <= chunk:
            self._unacked.popleft()

    def request_keyframe(self) -> None:
        """Let the next chunk that is sent begin with a frame that can be decoded by itself."""
        self._keyframe = True

    async def deliver(self, chunk: GeneratedChunk) -> None:
        """Have a chunk decoded, and send it or, for a client without credit that asked for that, drop it.

        Raises:
            Unavailable: If no decoder keeps the session's cache long enough.
        """
        arrived = time.perf_counter()
        sends = self.has_credit or not self._request.drops
        keyframe, self._keyframe = sends and self._keyframe, False  # what is asked for from here on is for the next one
        decoded = await self._link.decode(chunk, first_frame=self._outbox.next_frame, encode=sends, keyframe=keyframe)
        self._spent.chunk(chunk, decoded)
        self._meter.chunk(chunk, decoded, time.perf_counter() - arrived)
        text_s = self._feed.applied(len(chunk.superseded)) if chunk.prompt_applied else 0.0
        if sends:
            self._send(chunk, decoded, ChunkCosts.of(chunk, decoded, text_s, time.perf_counter() - arrived))
        else:
            self._outbox.drop(chunk)
            self._keyframe = True

    def _send(self, chunk: GeneratedChunk, decoded: Decoded, costs: ChunkCosts) -> None:
        goal = self._request.goal
        size = sum(len(frame.data) for frame in decoded.frames or ())
        if goal is not None and self._outbox.byte_count + size > goal.max_bytes:
            self.is_complete = True
            return
        self._outbox.chunk(chunk, decoded, costs)
        self._unacked.append(chunk.index)
        self.last_sent = chunk.index
        self.is_complete = goal is not None and self._outbox.next_frame >= goal.min_frames
