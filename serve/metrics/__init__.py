"""What the service measures: the table of metrics, where values go, and who records them."""

from .definitions import ALL, PREFIX, Kind, Metric, Role
from .recorder import SILENT, Recorder
from .sinks import MemorySink, NoSink, PrometheusSink, RaySink, Sink

__all__ = [
    "ALL",
    "PREFIX",
    "SILENT",
    "Kind",
    "MemorySink",
    "Metric",
    "NoSink",
    "PrometheusSink",
    "RaySink",
    "Recorder",
    "Role",
    "Sink",
]
