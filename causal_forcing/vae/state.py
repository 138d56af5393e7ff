"""What a streaming autoencoder remembers of one stream: a preallocated value, measured, reset, copied out and in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from causal_forcing.errors import SessionStateError
from causal_forcing.geometry import Geometry

_FRAMES = "frames"


class StreamState:
    """The last frames that each temporal layer has seen of one stream; updated in place, never reallocated.

    Attributes:
        geometry: Frame size of the stream.
        buffers: Layer name to the frames it remembers, ``[frames, H, W, C]``, all zero in a fresh state.
        frames: Latent frames processed since the scene began; 0 means that the next one is the first.
        failed: Whether a call broke off half-way, so that the buffers no longer fit together.
    """

    kind: ClassVar[str] = "STREAM"

    def __init__(self, geometry: Geometry, buffers: Mapping[str, Tensor]) -> None:
        self.geometry = geometry
        self.buffers = dict(buffers)
        self.frames = 0
        self.failed = False

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers; constant over the life of the state."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def reset(self) -> None:
        """Forget everything: the next frame is the first of a scene. Also clears a failure."""
        for buffer in self.buffers.values():
            buffer.zero_()
        self.frames = 0
        self.failed = False

    def clone(self) -> Self:
        """Return an independent copy, equal bit for bit."""
        with torch.inference_mode(False):
            copy = type(self)(self.geometry, {name: buffer.clone() for name, buffer in self.buffers.items()})
        copy.frames, copy.failed = self.frames, self.failed
        return copy

    def tensors(self) -> dict[str, Tensor]:
        """Return everything :meth:`load_tensors` needs to continue the stream bit for bit.

        Returns:
            The live buffers (clone them to keep them) and ``frames``, an int64 scalar.

        Raises:
            SessionStateError: If the state is marked failed.
        """
        self.require_usable()
        return {**self.buffers, _FRAMES: torch.tensor(self.frames, dtype=torch.int64)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what :meth:`tensors` returned, or change nothing at all. Clears a failure.

        Raises:
            SessionStateError: If a part is missing, unknown, or of another shape or dtype (reason ``STATE_MISMATCH``).
        """
        expected = {**self.buffers, _FRAMES: torch.tensor(0, dtype=torch.int64)}
        if different := sorted(expected.keys() ^ tensors.keys()):
            raise SessionStateError(
                f"saved state has other parts than this one: {', '.join(different[:4])}", reason="STATE_MISMATCH"
            )
        for name, buffer in expected.items():
            given = tensors[name]
            if given.shape != buffer.shape or given.dtype != buffer.dtype:
                raise SessionStateError(
                    f"saved state's {name} is {given.dtype} {list(given.shape)}, "
                    f"expected {buffer.dtype} {list(buffer.shape)}",
                    reason="STATE_MISMATCH",
                )
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[name])
        self.frames = int(tensors[_FRAMES])
        self.failed = False

    def require_usable(self) -> None:
        """Raise :class:`SessionStateError` (reason ``DECODER_STATE_FAILED`` or ``ENCODER_STATE_FAILED``) if failed."""
        if self.failed:
            raise SessionStateError(
                "an earlier call broke off half-way; reset the state or load a saved one",
                reason=f"{self.kind}_STATE_FAILED",
            )

    @contextmanager
    def advancing(self) -> Iterator[None]:
        """Mark the state failed unless the enclosed update runs to its end."""
        self.require_usable()
        self.failed = True
        yield
        self.failed = False


class DecoderState(StreamState):
    """A stream's side of a decoder."""

    kind = "DECODER"

    @property
    def frames_decoded(self) -> int:
        """Latent frames decoded since the scene began; 0 means that the next one becomes a single pixel frame."""
        return self.frames


class EncoderState(StreamState):
    """A stream's side of an encoder."""

    kind = "ENCODER"

    @property
    def frames_encoded(self) -> int:
        """Latent frames encoded since the scene began; 0 means that the next pixel frame becomes a latent by itself."""
        return self.frames


class Vae(Protocol):
    """A streaming autoencoder: stateless weights; what belongs to a stream is passed in.

    Attributes:
        REACH: A fresh state primed with the last ``REACH`` latent frames decodes what follows exactly as one that has
            seen the whole stream.
    """

    REACH: ClassVar[int]

    def new_decoder_state(
        self, geometry: Geometry, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecoderState:
        """Return the state of a stream that has not begun; device and dtype default to those of the weights."""
        ...

    def decode(self, latents: Tensor, state: DecoderState) -> Tensor:
        """Decode normalised latents ``[1, 16, F, h, w]`` to float32 pixels ``[1, 3, f, H, W]`` in [-1, 1]."""
        ...

    def new_encoder_state(
        self, geometry: Geometry, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EncoderState:
        """Return the state of a stream that has not begun; device and dtype default to those of the weights."""
        ...

    def encode(self, video: Tensor, state: EncoderState | None = None) -> Tensor:
        """Encode pixels ``[1, 3, f, H, W]`` in [-1, 1] to normalised latents ``[1, 16, F, h, w]``."""
        ...
