"""The base of every part of a configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a configuration: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
