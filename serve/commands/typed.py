"""Prompts and commands that are typed while a session runs, a line each."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import TextIO

from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import PromptUpdate
from causal_forcing.script import parse_update
from serve.client import VideoSession

HELP = "type a prompt (`[policy=recache transition=4] it snows`), /pause, /resume, /keyframe or /end"

COMMANDS: Mapping[str, Callable[[VideoSession], None]] = {
    "/pause": VideoSession.pause,
    "/resume": VideoSession.resume,
    "/keyframe": VideoSession.request_keyframe,
    "/end": VideoSession.end,
}


class Typed:
    """Reads lines on a thread of its own, because a session must not wait for them, and passes them on.

    Args:
        lines: Where they come from.
        defaults: Options of prompts that do not give them.
        send: Sends a prompt, which is named, to a session.
        say: Tells what is not understood.
        at_end: Called when there are no more lines.
    """

    def __init__(
        self,
        lines: TextIO,
        defaults: Mapping[str, str],
        *,
        send: Callable[[VideoSession, PromptUpdate], None],
        say: Callable[[str], None],
        at_end: Callable[[], None],
    ) -> None:
        self._lines = lines
        self._defaults = defaults
        self._send = send
        self._say = say
        self._at_end = at_end
        self._numbers = itertools.count(1)
        self._session: VideoSession | None = None
        self._lock = threading.Lock()

    def start(self, session: VideoSession) -> None:
        """Pass lines on to a session from now on."""
        self._session = session
        threading.Thread(target=self._read, name="typed-prompts", daemon=True).start()

    def stop(self) -> None:
        """Leave the session alone: when this returns, nothing is under way to it."""
        with self._lock:
            self._session = None

    def _read(self) -> None:
        for line in self._lines:
            with self._lock:
                if self._session is None:
                    return
                if line.strip():
                    self._act(line.strip(), self._session)
        self._at_end()

    def _act(self, line: str, session: VideoSession) -> None:
        try:
            if line.startswith("/"):
                command = COMMANDS.get(line)
                if command is None:
                    raise InvalidRequest("command", line, f"must be one of {', '.join(COMMANDS)}, or a prompt")
                command(session)
            else:
                name = f"typed-{next(self._numbers)}"
                self._send(session, parse_update(line, self._defaults, prompt_id=name))
        except InvalidRequest as error:
            self._say(error.message)
