"""The configuration: strict, and without options that can have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from causal_forcing.errors import InvalidRequest
from serve.app import admission_name, app
from serve.config import load_config

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"colour": "red"}, "colour", "Extra inputs are not permitted"),
    ({"limits": {"max_sesion_s": 1}}, "limits.max_sesion_s", "Extra inputs are not permitted"),
    ({"preset": "huge"}, "config", "preset"),
    ({"vae": "none"}, "config", "vae"),
    ({"sizes": [[60, 64]]}, "config", "multiple of 16"),
    ({"generator": {"replicas": 0}}, "generator.replicas", "greater than or equal to 1"),
    ({"limits": {"default_credit_chunks": 9}}, "limits", "must not exceed max_credit_chunks"),
    ({"simulated": {"chunk_ms": 5}}, "config", "no effect without engine: simulated"),
    ({"engine": "simulated", "device": "cuda"}, "config", "no effect on a simulated engine"),
    ({"generator": {"num_gpus": 1}}, "config", "no effect on device: cpu"),
    ({"grpc_port": 70000}, "grpc_port", "65535"),
    ({"generator": {"replicas": 2, "autoscaling": {"max_replicas": 3}}}, "generator", "no effect beside autoscaling"),
    ({"vae_decoder": {"autoscaling": {}}}, "vae_decoder.autoscaling.max_replicas", "Field required"),
    (
        {"text_encoder": {"autoscaling": {"min_replicas": 2, "max_replicas": 2}}},
        "text_encoder.autoscaling",
        "`replicas`",
    ),
    ({"gateway": {"autoscaling": {"min_replicas": 0, "max_replicas": 2}}}, "gateway.autoscaling.min_replicas", "to 1"),
    ({"gateway": {"max_sessions": 9, "autoscaling": {"max_replicas": 2}}}, "gateway", "must not exceed max_sessions"),
    ({"generator": {"autoscaling": {"max_replicas": 2, "spare_sessions": 3}}}, "generator", "exceed the 2 places"),
    (
        {"generator": {"autoscaling": {"min_replicas": 0, "max_replicas": 2, "spare_sessions": 1}}},
        "generator",
        "no effect beside spare_sessions",
    ),
    (
        {"generator": {"autoscaling": {"min_replicas": 0, "max_replicas": 2}}, "limits": {"max_queued_sessions": 0}},
        "config",
        "needs a queue",
    ),
    ({"engine": "simulated", "generator": {"memory_bytes": 1 << 30}}, "config", "no effect on a simulated engine"),
    ({"engine": "simulated", "generator": {"compile": True}}, "config", "generator.compile can have no effect"),
    ({"generator": {"quantization": "int3"}}, "generator.quantization", "fp8_e4m3fn"),
    ({"generator": {"quantization": "fp8_e4m3fn"}}, "config", "generator.quantization: fp8_e4m3fn needs device: cuda"),
    ({"preset": "longlive", "max_window_frames": 2}, "config", "max_window_frames must be at least 3"),
    (
        {"generator": {"memory_bytes": 300 << 20, "sessions_per_replica": 64}},
        "config",
        "64 x keys and values of",
    ),
]


@pytest.mark.parametrize(("fields", "where", "message"), REFUSED)
def test_what_is_wrong_is_named(fields: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_config(None, **fields)
    assert caught.value.metadata["field"] == where
    assert message in caught.value.message


def test_a_file_is_read_and_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("preset: tiny\ngenerator: {replicas: 3}\nlimits: {max_session_s: 60}\n")
    config = load_config(path, grpc_port=9100)
    assert (config.generator.replicas, config.limits.max_session_s, config.grpc_port) == (3, 60, 9100)


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00", "preset: 2026-31-12", "preset: 0b_", "[" * 3000])
def test_a_file_that_is_not_a_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest):
        load_config(path)
    with pytest.raises(InvalidRequest):
        load_config(tmp_path / "missing.yaml")


def test_a_device_with_room_for_its_sessions_is_accepted() -> None:
    one, many = ({"memory_bytes": 300 << 20, "sessions_per_replica": count} for count in (1, 64))
    needed = load_config(None, generator=one).generator_memory().total_bytes
    assert needed < 300 << 20
    roomy = load_config(None, generator={**many, "memory_bytes": 16 << 30})
    assert roomy.generator_memory().total_bytes > needed


def test_admission_belongs_to_one_version_of_the_application() -> None:
    assert admission_name(load_config(None)) == admission_name(load_config(None))
    assert admission_name(load_config(None)) != admission_name(load_config(None, generator={"replicas": 2}))


def test_the_application_is_built_from_plain_arguments_and_refuses_unknown_ones() -> None:
    assert app({"engine": "simulated"})
    with pytest.raises(ValidationError):
        app({"unknown": 1})
