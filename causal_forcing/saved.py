"""What the files of saved sessions share: JSON forms of configurations and prompts, and reading one safely."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from causal_forcing.config import SessionConfig
from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import PromptUpdate, WeightedPrompt

FORMAT = 1
"""Version of both file layouts."""


def config_to_json(config: SessionConfig) -> dict[str, Any]:
    """Return a session configuration as JSON values."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def config_from_json(values: dict[str, Any]) -> SessionConfig:
    """Return the configuration that :func:`config_to_json` wrote."""
    restored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return SessionConfig(**restored)


def update_to_json(update: PromptUpdate) -> dict[str, Any]:
    """Return a prompt update as JSON values."""
    return asdict(update) | {"prompts": [asdict(prompt) for prompt in update.prompts]}


def update_from_json(values: dict[str, Any]) -> PromptUpdate:
    """Return the update that :func:`update_to_json` wrote."""
    return PromptUpdate(**(values | {"prompts": tuple(WeightedPrompt(**p) for p in values["prompts"])}))


@contextmanager
def parsing(kind: str, source: object) -> Iterator[None]:
    """Turn what a damaged or foreign file makes the enclosed code trip over into :class:`InvalidRequest`."""
    try:
        yield
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InvalidRequest(kind, str(source), f"must be a {kind} of this program") from error


def read_file(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the meta data and the tensors of a saved session.

    Raises:
        InvalidRequest: If the file is damaged, of another kind or of another format.
    """
    with parsing(kind, path), safe_open(path, framework="pt") as file:
        meta = json.loads((file.metadata() or {})[kind])
        if meta.get("format") != FORMAT:
            raise InvalidRequest(f"{kind}.format", meta.get("format"), f"must be {FORMAT}")
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
