"""`causal-forcing sessions`: see and end the sessions of a running service."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from serve.client import SessionInfo, VideoClient, VideoServiceError
from serve.commands.connecting import add_connection_arguments, connect, failed

COLUMNS = ("session", "tenant", "state", "age", "ahead", "chunks", "frames", "dropped", "MB", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sessions`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all sessions (operators only)", description="Show all sessions.")
    showing = actions.add_parser("show", help="one session", description="Show one session.")
    ending = actions.add_parser("end", help="end a session (operators only)", description="End sessions.")
    showing.add_argument("id", metavar="ID", help="the session's name")
    ending.add_argument("id", nargs="+", metavar="ID", help="the sessions' names")
    for action in (listing, showing, ending):
        add_connection_arguments(action)
    for action in (listing, showing):
        action.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Do what was asked for; return 0, or 1 if the service refused it."""
    try:
        with connect(args) as client:
            if args.action == "end":
                _end(client, args.id)
            else:
                found = client.list_sessions() if args.action == "list" else [client.get_session(args.id)]
                print("\n".join(_json(found) if args.json else _table(found)))
    except VideoServiceError as error:
        return failed("sessions", error)
    return 0


def _end(client: VideoClient, names: Sequence[str]) -> None:
    for name in names:
        client.end_session(name)
        print(f"{name} is being ended")


def _json(found: Sequence[SessionInfo]) -> list[str]:
    return [json.dumps(dataclasses.asdict(info)) for info in found]


def _table(found: Sequence[SessionInfo]) -> list[str]:
    """Return lines of columns, as wide as what is in them."""
    rows = [COLUMNS, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(info: SessionInfo) -> tuple[str, ...]:
    ahead = str(info.sessions_ahead) if info.state == "QUEUED" else "-"
    counts = (info.chunk_count, info.frame_count, info.dropped_frame_count)
    sizes = f"{info.byte_count / 1e6:.1f}", f"{info.gateway_memory_bytes / 1e6:.1f}MB"
    return (info.session_id, info.tenant, info.state.lower(), f"{info.age_s:.0f}s", ahead, *map(str, counts), *sizes)
