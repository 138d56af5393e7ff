"""Noise as a pure function of seed, chunk and draw: nothing runs on, so any chunk can be drawn again anywhere."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Where a session's noise comes from; injectable, so that a reference run can be replayed."""

    def __call__(self, chunk: int, draw: int, shape: tuple[int, ...]) -> Tensor:
        """Return float32 CPU noise of that shape.

        Args:
            chunk: Index of the chunk.
            draw: 0 for the starting noise, k for the noise added after denoising step k (counted from 1).
            shape: ``[1, C, F, h, w]``.
        """
        ...


@dataclass(frozen=True)
class SeededNoise:
    """Standard normal noise, the same on every device because it is drawn on the CPU in float32.

    Attributes:
        seed: The session's seed.
    """

    seed: int

    def __call__(self, chunk: int, draw: int, shape: tuple[int, ...]) -> Tensor:
        """Return the noise of one draw; see :class:`NoiseSource`."""
        digest = hashlib.blake2b(struct.pack("<qqq", self.seed, chunk, draw), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator, dtype=torch.float32)
