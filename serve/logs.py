"""Which session a log record is about: fields that travel with the task, and a filter that writes them into records."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Mapping
from types import MappingProxyType

from .access.config import LogConfig

LOGGER = logging.getLogger("ray.serve")
"""Serve's logger: its records carry the replica and, in a request's own task, the request."""

_FIELDS: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("log_fields", default=MappingProxyType({}))


def bind(**fields: str) -> None:
    """Add fields to every record that this task, and those that it starts from now on, will log."""
    known = {name: value for name, value in fields.items() if value}
    _FIELDS.set(MappingProxyType({**_FIELDS.get(), **known}))


def bound() -> Mapping[str, str]:
    """Return the fields of this task."""
    return _FIELDS.get()


class FieldsFilter(logging.Filter):
    """Writes the task's fields into records: as attributes, which a JSON formatter shows, or behind the text.

    Args:
        in_text: Whether to append them to the text.
    """

    def __init__(self, *, in_text: bool) -> None:
        super().__init__()
        self._in_text = in_text

    def filter(self, record: logging.LogRecord) -> bool:
        """Change a record; every one passes."""
        fields = bound()
        for name, value in fields.items():
            setattr(record, name, value)
        if fields and self._in_text:
            shown = " ".join(f"{name}={value}" for name, value in fields.items())
            record.msg = f"{record.getMessage()} [{shown}]"
            record.args = ()
        return True


def set_up(config: LogConfig) -> None:
    """Have this process's records carry their fields; once is enough."""
    for old in [known for known in LOGGER.filters if isinstance(known, FieldsFilter)]:
        LOGGER.removeFilter(old)
    LOGGER.addFilter(FieldsFilter(in_text=config.format == "text"))
