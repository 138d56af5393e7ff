"""Asks a hook of the operator's whether prompts and start images may be shown, before anything is made of them.

A hook is a function in the gateway's environment (``moderation.hook: module:function``), plain or ``async``:

    def check(question: Question) -> Verdict: ...

or an HTTP endpoint (``moderation.url``) that is sent ``{"session_id", "tenant", "prompts": [...], "image_base64"}`` and
answers 200 with ``{"allowed": true}`` or ``{"allowed": false, "category": "..."}``. ``examples/word_list.py`` is one.
What it sees stays with it: nothing of a question is ever in our logs.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import inspect
import json
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import aiohttp

from causal_forcing.errors import InvalidRequest
from serve.errors import Unavailable
from serve.logs import LOGGER

from .config import ModerationConfig

HOOK_THREADS = 8
"""Plain hooks that run at a time; one that never returns keeps its thread."""

MAX_ANSWER_BYTES = 64 << 10
"""Longest answer of an endpoint that is read."""

_CATEGORY = re.compile(r"[\w .:/-]{1,64}")


@dataclass(frozen=True)
class Question:
    """What a hook is asked about.

    Attributes:
        session_id: The session.
        tenant: Whose it is.
        prompts: Texts that are to be shown together.
        image: Start image as the client sent it, JPEG or PNG; empty if there is none.
    """

    session_id: str
    tenant: str
    prompts: tuple[str, ...]
    image: bytes = b""


@dataclass(frozen=True)
class Verdict:
    """What a hook answers.

    Attributes:
        allowed: Whether it may be shown.
        category: Why not, in a word or two; the client is told.
    """

    allowed: bool
    category: str = ""


Hook = Callable[[Question], Verdict | Awaitable[Verdict]]
"""A hook."""


class Moderator:
    """Asks the configured hook, with a time limit and an answer for when it fails."""

    def __init__(self, config: ModerationConfig) -> None:
        """Load the hook.

        Raises:
            InvalidRequest: If there is no such function.
        """
        self._config = config
        self._hook = load_hook(config.hook) if config.hook is not None else self._ask_endpoint
        self._threads = ThreadPoolExecutor(HOOK_THREADS, thread_name_prefix="moderation")
        self._http: aiohttp.ClientSession | None = None

    async def check(self, question: Question) -> None:
        """Return if something may be shown.

        Raises:
            InvalidRequest: If it may not (``CONTENT_REFUSED``).
            Unavailable: If there was no verdict, and that is not enough (``MODERATION_UNAVAILABLE``).
        """
        try:
            async with asyncio.timeout(self._config.timeout_s):
                verdict = await self._ask(question)
                allowed, category = verdict.allowed, verdict.category
        except Exception as error:  # noqa: BLE001  (foreign code: whatever it does, the operator has said what then)
            LOGGER.error("no verdict of the moderation hook: %s", type(error).__name__)
            if self._config.on_failure == "allow":
                return
            raise Unavailable("the content could not be checked", reason="MODERATION_UNAVAILABLE") from None
        if not allowed:
            shown = f" ({category})" if _CATEGORY.fullmatch(category) else ""
            raise InvalidRequest("prompt", "(not shown)", f"is not allowed here{shown}", reason="CONTENT_REFUSED")

    async def close(self) -> None:
        """Close connections."""
        if self._http is not None:
            await self._http.close()

    async def _ask(self, question: Question) -> Verdict:
        if inspect.iscoroutinefunction(self._hook):
            verdict: Any = await self._hook(question)
        else:
            verdict = await asyncio.get_running_loop().run_in_executor(self._threads, self._hook, question)
        if not isinstance(verdict, Verdict):
            raise TypeError("a moderation hook must return a Verdict")
        return verdict

    async def _ask_endpoint(self, question: Question) -> Verdict:
        assert self._config.url is not None
        if self._http is None:
            self._http = aiohttp.ClientSession()
        body = {
            "session_id": question.session_id,
            "tenant": question.tenant,
            "prompts": question.prompts,
            "image_base64": base64.b64encode(question.image).decode(),
        }
        async with self._http.post(self._config.url, json=body, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            answer = json.loads(await _read(response.content))
        if not isinstance(answer["allowed"], bool):
            raise TypeError("allowed must be true or false")
        return Verdict(answer["allowed"], str(answer.get("category", "")))


async def _read(stream: aiohttp.StreamReader) -> bytes:
    """Return an answer, which may come in pieces."""
    data = bytearray()
    async for piece in stream.iter_any():
        data += piece
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def load_hook(path: str) -> Hook:
    """Return the function that a path ``module:function`` names.

    Raises:
        InvalidRequest: If there is none.
    """
    module, _, name = path.partition(":")
    try:
        hook = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidRequest("moderation.hook", path, f"must be importable here ({error})") from error
    if not callable(hook):
        raise InvalidRequest("moderation.hook", path, "must name a function")
    found: Hook = hook
    return found
