"""The gateway's side of decoding: which decoder has this session's cache, and the latents to make it anew elsewhere."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from .backends import Backends
from .errors import Unavailable
from .frames import FrameFormat
from .messages import PRIME_FRAMES, CloseDecoder, Decoded, DecodeRequest, GeneratedChunk, PackedTensor

PRIME_ATTEMPTS = 3
"""How often a cache may get lost between two calls before the session ends."""


class LatentHistory:
    """The last latent frames of a scene: enough to give any decoder exactly the cache it would have."""

    def __init__(self, frames: int = PRIME_FRAMES) -> None:
        self._frames: deque[PackedTensor] = deque(maxlen=frames)

    def append(self, latents: PackedTensor, *, starts_scene: bool) -> None:
        """Add a chunk; a new scene forgets the one before. The numbers are copied out of shared memory."""
        if starts_scene:
            self._frames.clear()
        for frame in range(latents.frames):
            one = latents.frame_slice(frame, frame + 1)
            self._frames.append(replace(one, data=one.data.copy()))

    def latents(self) -> PackedTensor | None:
        """Return all frames in order, or None if there is none."""
        return PackedTensor.join_frames(list(self._frames)) if self._frames else None

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        return sum(frame.nbytes for frame in self._frames)


class DecoderLink:
    """Decodes one session's chunks in order, wherever its cache is."""

    def __init__(self, backends: Backends, session_id: str, size: tuple[int, int], frame_format: FrameFormat) -> None:
        self._backends = backends
        self._session_id = session_id
        self._height, self._width = size
        self._format = frame_format
        self._history = LatentHistory()
        self._replica_id = ""

    async def decode(
        self, chunk: GeneratedChunk, *, first_frame: int = 0, encode: bool = True, keyframe: bool = False
    ) -> Decoded:
        """Return the chunk's frames.

        Args:
            chunk: The next one.
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
            height=self._height,
            width=self._width,
            format=self._format,
            first_frame=first_frame,
            encode=encode,
            keyframe=keyframe,
        )
        for _ in range(PRIME_ATTEMPTS):
            answer = await self._backends.decode(request)
            self._replica_id = answer.replica_id
            if answer.frames is not None:
                self._history.append(chunk.latents, starts_scene=chunk.starts_scene)
                return answer
            request = replace(request, replica_id=answer.replica_id, history=self._history.latents())
        raise Unavailable("no decoder keeps this session's cache", reason="DECODER_LOST")

    @property
    def nbytes(self) -> int:
        """Memory of the latents that are kept."""
        return self._history.nbytes

    async def close(self) -> None:
        """Let the decoder forget the session."""
        if self._replica_id:
            await self._backends.close_decoder(CloseDecoder(self._replica_id, self._session_id))
