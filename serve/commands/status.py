"""`causal-forcing status`: whether a service is well, which model it runs, and who waits."""

from __future__ import annotations

import argparse
import http.client
import json
from collections import Counter
from typing import Any

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.client import SessionInfo, VideoClient, VideoServiceError
from serve.commands.connecting import EXIT_FAILED, add_connection_arguments, connect, failed

HTTP_PORT = 8000
HTTP_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `status`."""
    add_connection_arguments(parser)
    parser.add_argument(
        "--http", metavar="HOST:PORT", help=f"where the service answers HTTP (default: the server's host, {HTTP_PORT})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print how the service is; return 0 if it is ready for sessions, 1 if it is not or does not answer."""
    health = ask_health(args.http or f"{args.server.rpartition(':')[0]}:{HTTP_PORT}")
    try:
        with connect(args) as client:
            model, sessions = client.get_model(), _sessions(client)
    except VideoServiceError as error:
        print(f"ready     {_ready(health)}")
        return failed("status", error)
    known = {"ready": health, "model": _model(model), "sessions": _counts(sessions)}
    print(json.dumps(known) if args.json else _text(args.server, health, model, sessions))
    return 0 if health.get("ready") else EXIT_FAILED


def ask_health(address: str) -> dict[str, Any]:
    """Return what `/readyz` says; with the key `error` instead where nothing sensible does."""
    connection = http.client.HTTPConnection(address, timeout=HTTP_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return {"error": f"http://{address}/readyz does not answer ({type(error).__name__})"}
    finally:
        connection.close()
    if not isinstance(answer, dict) or "ready" not in answer:
        return {"error": f"http://{address}/readyz is not this service's"}
    return answer


def _sessions(client: VideoClient) -> list[SessionInfo] | None:
    """Return all sessions; None for a caller who may not see them."""
    try:
        return client.list_sessions()
    except VideoServiceError as error:
        if error.reason == "NOT_OPERATOR":
            return None
        raise


def _text(server: str, health: dict[str, Any], model: pb.GetModelResponse, sessions: list[SessionInfo] | None) -> str:
    info, limits = model.model, model.limits
    sizes = ", ".join(f"{size.height}x{size.width}" for size in model.sizes)
    weights = "trained" if info.trained else "random weights"
    longest_s, video_s = limits.max_duration.ToSeconds(), model.max_generate_duration.ToSeconds()
    return (
        f"service   {server}, version {model.version}\n"
        f"ready     {_ready(health)}\n"
        f"model     {info.name} ({weights}), VAE {info.vae}, {info.frames_per_second} frames a second\n"
        f"sizes     {sizes}\n"
        f"limits    window {model.max_window_frames}, credit {model.max_credit_chunks}, "
        f"sessions of {longest_s} s, videos of {video_s} s\n"
        f"sessions  {_queue(sessions)}"
    )


def _ready(health: dict[str, Any]) -> str:
    if health.get("ready"):
        return "yes"
    missing = "; ".join(f"{name}: {why}" for name, why in health.get("missing", {}).items())
    return f"no: {missing}" if missing else f"unknown: {health.get('error', 'no reason given')}"


def _queue(sessions: list[SessionInfo] | None) -> str:
    if sessions is None:
        return "shown to operators only"
    counts = _counts(sessions) or {}
    text = ", ".join(f"{count} {state}" for state, count in counts.items())
    waits = [info.age_s for info in sessions if info.state == "QUEUED"]
    return f"{text}, the longest wait {max(waits):.0f} s" if waits else text


def _counts(sessions: list[SessionInfo] | None) -> dict[str, int] | None:
    if sessions is None:
        return None
    counts = Counter(info.state for info in sessions)
    return {state.lower(): counts[state] for state in ("RUNNING", "PAUSED", "QUEUED")}


def _model(model: pb.GetModelResponse) -> dict[str, Any]:
    return {
        "name": model.model.name,
        "trained": model.model.trained,
        "vae": model.model.vae,
        "sizes": [[size.height, size.width] for size in model.sizes],
        "version": model.version,
    }
