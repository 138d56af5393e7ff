"""Rotary position embedding over (time, row, column), computed on demand for any position.

Adjacent elements ``(2i, 2i+1)`` of a head are one complex pair; the first pairs rotate with the latent frame's
position, the next with the token's row, the last with its column. Nothing is tabulated along time, so positions have
no limit.

Source: Wan2.1 ``wan/modules/model.py`` (rope_params, rope_apply); thu-ml/Causal-Forcing@1fc7bbc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causal_forcing.config import TransformerConfig
from causal_forcing.geometry import Geometry

ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Rotation:
    """Rotation of every pair of the tokens of some latent frames.

    Attributes:
        pairs: ``[L, 1, D / 2, 2]`` float32: cosine, sine.
    """

    pairs: Tensor


class RotaryEmbedding:
    """Makes the :class:`Rotation` of any latent frames of one frame size.

    The row and column angles are constant, so only the time angles are computed per call. They come from host integers,
    in float64 (exact to 2**53 frames), and reach the device as kernel arguments: no table, no copy, no synchronisation.
    """

    def __init__(self, config: TransformerConfig, geometry: Geometry, device: torch.device) -> None:
        time_pairs, row_pairs, column_pairs = config.rope_pairs
        rows = torch.arange(geometry.grid_height, dtype=torch.float64, device=device)
        columns = torch.arange(geometry.grid_width, dtype=torch.float64, device=device)
        row_angles = rows[:, None, None] * _frequencies(row_pairs, device)
        column_angles = columns[None, :, None] * _frequencies(column_pairs, device)
        grid = (geometry.grid_height, geometry.grid_width)
        self._time_frequencies = _frequencies(time_pairs, device)
        self._spatial_angles = torch.cat(
            [row_angles.expand(*grid, row_pairs), column_angles.expand(*grid, column_pairs)], dim=-1
        ).flatten(0, 1)

    def rotation(self, positions: Sequence[int]) -> Rotation:
        """Return the rotation of one latent frame per position, frames in the given order.

        Args:
            positions: Latent frame positions, any integers.
        """
        tokens = self._spatial_angles.shape[0]
        angles = torch.cat(
            [
                torch.cat([(self._time_frequencies * float(p)).expand(tokens, -1), self._spatial_angles], dim=-1)
                for p in positions
            ]
        )
        return Rotation(torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None].float())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Return ``x`` rotated, in its own dtype; the arithmetic is float32.

    Args:
        x: ``[B, L, H, D]``.
        rotation: Of the same ``L`` tokens.
    """
    pairs = x.float().view(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic only; eager, one complex product is fastest
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.pairs.unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation.pairs))
    return rotated.flatten(-2).to(x.dtype)


def _frequencies(pairs: int, device: torch.device) -> Tensor:
    return ROPE_BASE ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
