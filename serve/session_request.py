"""What a client asks for, once it has been read and checked: a session."""

from __future__ import annotations

from dataclasses import dataclass

from causal_forcing.config import SessionConfig
from causal_forcing.prompts import PromptUpdate
from serve.codecs.frames import FrameFormat


@dataclass(frozen=True)
class Goal:
    """When a video of a given length is complete.

    Attributes:
        min_frames: Pixel frames it shall have; it ends with the chunk that holds the last of them.
        max_bytes: Bytes of encoded frames after which it ends in any case.
    """

    min_frames: int
    max_bytes: int


@dataclass(frozen=True)
class SessionRequest:
    """A checked SessionConfig.

    Attributes:
        config: What the engine shall run.
        prompt: Of the first chunk.
        format: How frames are encoded.
        credit_chunks: Chunks the session may be ahead of the last ack.
        is_paced: Whether it keeps the time of the video rather than going as fast as possible.
        drops: Whether a client without credit misses chunks rather than holding the video up.
        start_image: File that the video starts from; empty for none.
        goal: Length of the video for a client that only reads; None until the client ends it.
    """

    config: SessionConfig
    prompt: PromptUpdate
    format: FrameFormat
    credit_chunks: int
    is_paced: bool = True
    drops: bool = False
    start_image: bytes = b""
    goal: Goal | None = None

    @property
    def frames_per_second(self) -> int:
        """Rate at which the video is shown."""
        return self.format.frames_per_second

    @property
    def gives_itself_credit(self) -> bool:
        """Whether generation goes on without the client's acks."""
        return self.drops or self.goal is not None
