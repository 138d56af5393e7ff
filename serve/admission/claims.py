"""What a session asks admission for."""

from __future__ import annotations

from causal_forcing.config import SessionConfig
from causal_forcing.footprint import session_bytes
from serve.config import ServiceConfig
from serve.messages import Claim, Share
from serve.session_request import SessionRequest

ITEM_BYTES = {"cpu": 4, "cuda": 2}
"""Bytes of a number in a generator's caches, by device: float32 or bfloat16."""


def claim(session_id: str, request: SessionRequest, share: Share, service: ServiceConfig) -> Claim:
    """Return a session's claim: its tenant's share, and the memory that it needs in a generator."""
    return Claim(session_id, share, generator_bytes(service, request.config))


def generator_bytes(service: ServiceConfig, config: SessionConfig) -> int:
    """Return what a session holds in a generator: keys and values of its frames, its sink and its prompt."""
    return session_bytes(service.model_preset.transformer, config, ITEM_BYTES[service.device])
