"""What an engine in a process of its own does, by the metrics of the service's generators and decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from .definitions import Role
from .recorder import SILENT, Recorder
from .served import served_metrics


class EngineMeter:
    """Sees one session's chunks.

    Args:
        recorder: Where it goes.
    """

    def __init__(self, recorder: Recorder = SILENT) -> None:
        self._recorder = recorder
        self._rebuilds = 0

    def ready(self, phases: Mapping[str, float]) -> None:
        """The engine can begin; ``phases`` are those of :class:`~causal_forcing.startup.StartUp`."""
        self._recorder.ready(phases.get("load", 0.0), phases.get("compile", 0.0))

    def made(self, denoise_s: float, context_s: float, decode_s: float) -> None:
        """A chunk was made and decoded."""
        for stage, seconds in (("denoise", denoise_s), ("context", context_s), ("decode", decode_s)):
            self._recorder.stage(stage, seconds)

    def holds(self, nbytes_by_part: Mapping[str, int], rebuilds: int) -> None:
        """The session's state has these sizes; its cache was recomputed so often since it began."""
        self._recorder.cache("kv", nbytes_by_part["self_attention"] + nbytes_by_part["cross_attention"])
        self._recorder.cache("decoder", nbytes_by_part["decoder"])
        if rebuilds > self._rebuilds:
            self._recorder.recached(rebuilds - self._rebuilds)
            self._rebuilds = rebuilds


@contextmanager
def engine_metrics(port: int) -> Iterator[EngineMeter]:
    """Serve an engine's metrics at ``http://127.0.0.1:port/metrics`` for as long as the block runs.

    Raises:
        InvalidRequest: If the port cannot be had (field ``metrics_port``).
    """
    with served_metrics(port, Role.GENERATOR, Role.REPLICA) as recorder:
        yield EngineMeter(recorder)
