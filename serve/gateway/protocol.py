"""What a client may say when: the state machine of one StreamVideo call's input, without any input or output."""

from __future__ import annotations

import time

from causal_forcing.errors import InvalidRequest, NoCapacity, SessionStateError
from causal_forcing.prompts import PromptUpdate
from protos.causal_forcing.v1 import video_pb2 as pb
from serve.config import ServiceConfig
from serve.messages import Credit
from serve.session_request import SessionRequest

from .requests import parse_config, parse_prompt

ClientEvent = SessionRequest | PromptUpdate | Credit | pb.Ping | pb.End | pb.Pause | pb.Resume | pb.RequestKeyframe
"""A checked message."""


class MessageRate:
    """Counts a client's messages: so many a second in the long run, twice as many at once.

    What a client sends is answered, and the answers of one that does not read pile up, so there has to be a bound.
    """

    def __init__(self, per_s: float, now_s: float) -> None:
        self._per_s = per_s
        self._left = self._most = 2 * per_s
        self._now_s = now_s

    def count(self, now_s: float) -> None:
        """Count one message.

        Raises:
            NoCapacity: If there were too many.
        """
        self._left = min(self._most, self._left + (now_s - self._now_s) * self._per_s)
        self._now_s = now_s
        if self._left < 1:
            raise NoCapacity(f"more than {self._per_s:g} messages a second", reason="TOO_MANY_MESSAGES")
        self._left -= 1


class Conversation:
    """Checks one client's messages in order.

    Attributes:
        sent_chunk: Highest chunk index whose frames were sent; the caller advances it.
    """

    def __init__(self, service: ServiceConfig) -> None:
        self.sent_chunk = -1
        self._service = service
        self._configured = False
        self._prompts = 0
        self._acked = -1
        self._rate = MessageRate(service.limits.max_messages_per_s, time.monotonic())

    def receive(self, message: pb.StreamVideoRequest) -> ClientEvent | None:
        """Return the meaning of a message; None for one that a later version of the protocol has added.

        Raises:
            SessionStateError: If the message does not fit here (``CONFIG_NOT_FIRST``, ``CONFIG_REPEATED``).
            InvalidRequest: If it holds a value that is not allowed.
            NoCapacity: If messages come too fast.
        """
        self._rate.count(time.monotonic())
        kind = message.WhichOneof("message")
        if kind is None:
            return None
        if kind == "config":
            return self._config(message.config)
        if not self._configured:
            raise SessionStateError(
                f"the first message must be config, got {kind}", reason="CONFIG_NOT_FIRST", metadata={"got": kind}
            )
        if kind == "prompt":
            update = parse_prompt(message.prompt, self._prompts)
            self._prompts += 1
            return update
        if kind == "ack":
            return self._ack(message.ack)
        plain: pb.Ping | pb.End | pb.Pause | pb.Resume | pb.RequestKeyframe = getattr(message, kind)
        return plain

    @staticmethod
    def without_config() -> SessionStateError:
        """Return what a stream that ended before its config is told."""
        return SessionStateError("the stream ended before its config", reason="CONFIG_NOT_FIRST")

    def _config(self, message: pb.SessionConfig) -> SessionRequest:
        if self._configured:
            raise SessionStateError("config may only be the first message", reason="CONFIG_REPEATED")
        request = parse_config(message, self._service)
        self._configured = True
        self._prompts = 1
        return request

    def _ack(self, message: pb.Ack) -> Credit:
        chunk = message.chunk_index
        if not 0 <= chunk <= self.sent_chunk:
            allowed = (
                f"must be a chunk that was sent, 0 to {self.sent_chunk}" if self.sent_chunk >= 0 else "none was sent"
            )
            raise InvalidRequest("ack.chunk_index", chunk, allowed, reason="INVALID_ACK")
        if chunk < self._acked:
            allowed = f"must not be below the last one, {self._acked}"
            raise InvalidRequest("ack.chunk_index", chunk, allowed, reason="INVALID_ACK")
        self._acked = chunk
        return Credit(chunk)
