"""Sizes that tie pixels, latents and tokens together; the only place where 8, 4 and 2 are written.

Source: Wan2.1 (VAE strides 4x8x8, transformer patch 1x2x2); thu-ml/Causal-Forcing@1fc7bbc.
"""

from __future__ import annotations

from dataclasses import dataclass

from causal_forcing.errors import InvalidRequest

SPATIAL_STRIDE = 8
"""Pixels per latent, along height and along width."""

TEMPORAL_STRIDE = 4
"""Pixel frames per latent frame, after the first (which is one pixel frame)."""

PATCH = 2
"""Latents per token, along height and along width."""

LATENT_CHANNELS = 16
"""Channels of a latent frame."""

FRAMES_PER_SECOND = 16
"""Pixel frames a second at which the model was trained."""

SIZE_MULTIPLE = SPATIAL_STRIDE * PATCH
"""Height and width in pixels must be multiples of this."""


@dataclass(frozen=True)
class Geometry:
    """Frame size of one session and everything that follows from it.

    Attributes:
        height: Pixel rows, a positive multiple of 16.
        width: Pixel columns, a positive multiple of 16.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        for field in ("height", "width"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % SIZE_MULTIPLE:
                raise InvalidRequest(
                    field,
                    value,
                    f"must be a positive multiple of {SIZE_MULTIPLE} pixels",
                    reason="UNSUPPORTED_RESOLUTION",
                )

    @property
    def latent_height(self) -> int:
        """Rows of a latent frame."""
        return self.height // SPATIAL_STRIDE

    @property
    def latent_width(self) -> int:
        """Columns of a latent frame."""
        return self.width // SPATIAL_STRIDE

    @property
    def grid_height(self) -> int:
        """Rows of the token grid."""
        return self.latent_height // PATCH

    @property
    def grid_width(self) -> int:
        """Columns of the token grid."""
        return self.latent_width // PATCH

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame (1560 at 480x832)."""
        return self.grid_height * self.grid_width

    def latent_shape(self, frames: int) -> tuple[int, int, int, int, int]:
        """Return the shape ``[1, 16, frames, h, w]`` of that many latent frames."""
        return (1, LATENT_CHANNELS, frames, self.latent_height, self.latent_width)


def pixel_frames(latent_frames: int, *, first: bool) -> int:
    """Return how many pixel frames that many latent frames decode to.

    Args:
        latent_frames: Number of latent frames, at least 0.
        first: Whether they begin a scene: its first latent frame is one pixel frame, every other one is four.
    """
    if latent_frames == 0:
        return 0
    return TEMPORAL_STRIDE * latent_frames - (TEMPORAL_STRIDE - 1 if first else 0)
