"""What a session asks admission for."""

from __future__ import annotations

from causal_forcing.footprint import session_bytes

from .config import ServiceConfig
from .messages import Claim, Share
from .requests import SessionRequest

ITEM_BYTES = {"cpu": 4, "cuda": 2}
"""Bytes of a number in a generator's caches, by device: float32 or bfloat16."""


def claim(session_id: str, request: SessionRequest, share: Share, service: ServiceConfig) -> Claim:
    """Return a session's claim: its tenant's share, and the memory that it needs in a generator."""
    nbytes = session_bytes(service.model_preset.transformer, request.config, ITEM_BYTES[service.device])
    return Claim(session_id, share, nbytes)
