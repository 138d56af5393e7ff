"""How long a cold start takes, phase by phase; imports no torch, so that its clock starts before torch does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PROGRAM_STARTED_S = time.perf_counter()
"""Clock when the program imported its first module of ours."""


def _ignore(_done: int, _total: int) -> None:
    """Show nothing."""


@dataclass
class StartUp:
    """The phases of a start: ``import``, ``load``, ``compile`` (only if asked for) and ``first chunk``.

    Attributes:
        on_warm_up: Called while compiled code is warmed up, with how many chunks are made and how many there will be.
        phases: Seconds by phase, in the order in which they ended.
    """

    on_warm_up: Callable[[int, int], None] = _ignore
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that the enclosed work takes to a phase; work that fails counts, too."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.phases[name] = self.phases.get(name, 0.0) + seconds

    @property
    def total_s(self) -> float:
        """Seconds of all phases."""
        return sum(self.phases.values())

    def __str__(self) -> str:
        """Return one line, such as ``3.21 s (import 2.10, load 0.61, first chunk 0.50)``."""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return f"{self.total_s:.2f} s ({parts})"
