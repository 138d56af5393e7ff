"""The gateway's side of decoding: which decoder has this session's cache, and how it is made anew elsewhere."""

from __future__ import annotations

from dataclasses import replace

from serve.codecs.frames import FrameFormat
from serve.errors import Unavailable
from serve.messages import CloseDecoder, Decoded, DecodeRequest, GeneratedChunk

from .backends import Backends
from .memory import SessionMemory

PRIME_ATTEMPTS = 3
"""How often a cache may get lost between two calls before the session ends."""


class DecoderLink:
    """Decodes one session's chunks in order, wherever its cache is.

    Args:
        backends: The other processes.
        session_id: Whose chunks.
        memory: The session's; it has the latents before each chunk.
        frame_format: How frames are encoded.
    """

    def __init__(self, backends: Backends, session_id: str, memory: SessionMemory, frame_format: FrameFormat) -> None:
        self._backends = backends
        self._session_id = session_id
        self._memory = memory
        self._format = frame_format
        self._replica_id = ""

    async def decode(
        self, chunk: GeneratedChunk, *, first_frame: int = 0, encode: bool = True, keyframe: bool = False
    ) -> Decoded:
        """Return the chunk's frames.

        Args:
            chunk: The next one, which the memory has.
            first_frame: Number of its first pixel frame in the session.
            encode: False when nobody will see the chunk: only the cache goes on.
            keyframe: Whether its first frame must be decodable by itself.

        Raises:
            Unavailable: If no decoder keeps the cache long enough.
        """
        request = DecodeRequest(
            replica_id=self._replica_id,
            session_id=self._session_id,
            chunk_index=chunk.index,
            latents=chunk.latents,
            starts_scene=chunk.starts_scene,
            height=self._memory.config.height,
            width=self._memory.config.width,
            format=self._format,
            first_frame=first_frame,
            encode=encode,
            keyframe=keyframe,
        )
        for _ in range(PRIME_ATTEMPTS):
            answer = await self._backends.decode(request)
            self._replica_id = answer.replica_id
            if answer.frames is not None:
                return answer
            request = replace(request, replica_id=answer.replica_id, history=self._memory.before(chunk))
        raise Unavailable("no decoder keeps this session's cache", reason="DECODER_LOST")

    async def close(self) -> None:
        """Let the decoder forget the session."""
        if self._replica_id:
            await self._backends.close_decoder(CloseDecoder(self._replica_id, self._session_id))
