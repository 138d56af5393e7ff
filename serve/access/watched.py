"""Files that an operator changes while the service runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import yaml
from pydantic import ValidationError

from causal_forcing.errors import InvalidRequest
from serve.logs import LOGGER
from serve.section import Section

T = TypeVar("T")
S = TypeVar("S", bound=Section)


class WatchedFile(Generic[T]):
    """What a file says; a change that cannot be understood is logged, and what was known before stays in force.

    Mounted Kubernetes secrets and config maps change by a swap of symbolic links, which this sees as well.

    Attributes:
        value: What the file said when it was last read well.
    """

    def __init__(self, path: Path, parse: Callable[[str], T]) -> None:
        """Read the file.

        Raises:
            InvalidRequest: If it cannot be read or understood.
        """
        self._path = path
        self._parse = parse
        self._stamp = self._look()
        self.value = self._read()

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether there is a new value."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            value = self._read()
        except InvalidRequest as error:
            LOGGER.error("what was read before stays in force: %s", error.message)
            return False
        is_new = value != self.value
        self.value = value
        return is_new

    def _look(self) -> tuple[int, int, int] | None:
        """Return what changes when the file does."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> T:
        try:
            return self._parse(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest("file", str(self._path), f"must be readable ({type(error).__name__})") from error
        except InvalidRequest as error:
            raise InvalidRequest(f"{self._path}: {error.metadata['field']}", "(not shown)", error.message) from error


def parse_section(text: str, kind: type[S]) -> S:
    """Return a YAML or JSON text as a section.

    Raises:
        InvalidRequest: If it is not one; the message names the place and never shows the value, which may be secret.
    """
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: 2026-31-12, or 0b_
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark is not None else "somewhere"
        raise InvalidRequest("file", "(not shown)", f"must be YAML or JSON (a problem in {where})") from None
    if not isinstance(values, dict):
        raise InvalidRequest("file", "(not shown)", "must hold a mapping")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "file"
        raise InvalidRequest(name, "(not shown)", first["msg"]) from None
