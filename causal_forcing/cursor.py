"""Which frames a session's cache holds: integers alone, so that a gateway without torch can follow them.

A cache holds the first frames of a scene, the sink, and behind it a window that rolls; see
:mod:`causal_forcing.kv_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheCursor:
    """Which frames a cache holds, in absolute latent frame positions.

    Attributes:
        origin: First frame of the scene; of ``S`` sink frames the sink is ``origin .. origin + S - 1``.
        ring_start: Frame that the first slot behind the sink belongs to; ``origin + S`` until a flush moves it.
        end: One past the newest committed frame.
    """

    origin: int = 0
    ring_start: int = 0
    end: int = 0

    def held(self, sink_frames: int, ring_frames: int) -> tuple[range, range]:
        """Return the frames that are held, oldest first: of the sink, and of the rolling window.

        Args:
            sink_frames: Frames of the sink.
            ring_frames: Most frames of the rolling window.
        """
        oldest = min(max(self.ring_start, self.end - ring_frames), self.end)
        return range(self.origin, min(self.origin + sink_frames, self.end)), range(oldest, self.end)
