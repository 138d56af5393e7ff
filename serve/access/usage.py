"""What sessions used, for billing: one JSON line a session, however it ended.

The gateway writes the line when a session is over. When a gateway dies, admission writes the lines of its sessions,
from what the gateway last told (at most two seconds before); ``complete`` is false in those. A record says whose the
session was and what it took, and never what it showed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from serve.logs import LOGGER
from serve.messages import Decoded, GeneratedChunk, Progress

from .config import UsageConfig

VERSION: Final = 1
"""Of the record; rises when a field changes its meaning or goes."""

STDOUT: Final = 1
"""The standard output's file descriptor."""


@dataclass
class Spent:
    """Adds up what a running session takes of devices, in seconds.

    Attributes:
        prompt_count: Prompts it was given.
        text_s: In text encoders.
        denoise_s: In generators.
        decode_s: In decoders, rebuilt caches included.
        encode_s: In decoders, on the frames' encoding.
    """

    prompt_count: int = 0
    text_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0

    def prompt(self, text_s: float) -> None:
        """Add a prompt."""
        self.prompt_count += 1
        self.text_s += text_s

    def chunk(self, chunk: GeneratedChunk, decoded: Decoded) -> None:
        """Add a chunk."""
        self.denoise_s += chunk.denoise_s
        self.decode_s += decoded.decode_s + decoded.prime_s
        self.encode_s += decoded.encode_s


@dataclass(frozen=True)
class UsageRecord:
    """One line.

    Attributes:
        session_id: The session.
        tenant: Whose it was.
        preset: Model that it ran.
        age_s: From its arrival to its end, waiting included.
        end: ``CLIENT``, ``MAX_DURATION`` or another way to end well, or an error's reason.
        progress: What it had.
        complete: Whether ``progress`` is that of its end.
    """

    session_id: str
    tenant: str
    preset: str
    age_s: float
    end: str
    progress: Progress
    complete: bool = True

    def line(self, now: datetime) -> str:
        """Return the record as JSON; seconds to the millisecond."""
        progress = {name: round(value, 3) for name, value in dataclasses.asdict(self.progress).items()}
        for name in ("is_paused", "memory_bytes"):  # of the moment, which is over
            progress.pop(name)
        gpu = {name: progress.pop(f"{name}_s") for name in ("text", "denoise", "decode", "encode")}
        fields: dict[str, Any] = {
            "version": VERSION,
            "ended_at": now.isoformat(timespec="milliseconds"),
            "session_id": self.session_id,
            "tenant": self.tenant,
            "preset": self.preset,
            "age_s": round(self.age_s, 3),
            "end": self.end,
            "complete": self.complete,
            **progress,
            "device_s": gpu,
        }
        return json.dumps(fields, separators=(",", ":"))


class UsageWriter:
    """Appends records; each is one write to a file opened for appending, so that processes may share it.

    Args:
        config: Where they go; None: nowhere.
        process: Name of this process, for ``{process}``.
    """

    def __init__(self, config: UsageConfig | None, process: str) -> None:
        name = config.file if config is not None else ""
        self._to_stdout = name == "-"
        self._path = Path(name.replace("{process}", process)) if name not in ("", "-") else None

    def write(self, record: UsageRecord) -> None:
        """Write a record; one that cannot be written is put into the log in full."""
        line = record.line(datetime.now(UTC))
        data = f"{line}\n".encode()
        try:
            if self._to_stdout:
                os.write(STDOUT, data)  # Serve has put its logger in the place of sys.stdout
            elif self._path is not None:
                self._append(self._path, data)
        except OSError as error:
            LOGGER.error("a usage record could not be written (%s): %s", error, line)

    @staticmethod
    def _append(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)  # anew each time: it may be rotated
        try:
            os.write(file, data)
        finally:
            os.close(file)
