"""`causal-forcing demo`: the whole service once, on this machine, from nothing to a video file and back to nothing."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from causal_forcing.script import ScriptLine, build_update, parse_prompt
from serve.client import StreamOptions, VideoClient
from serve.commands.running import add_service_arguments, ends_in_order, read_service
from serve.commands.stream import EXIT_INTERRUPTED, view
from serve.commands.viewing import Viewer
from serve.local import free_port, local_service

FRAMES = 96
"""Length of the video: six seconds."""

SWITCH_S = 2.5
"""When the prompt is switched, in seconds of video."""

PROMPTS = ("a red circle moves to the right on a black background", "a blue square moves up on a white background")
"""What is shown first, and what after the switch."""

SEED = 7
"""The same video every time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    add_service_arguments(parser)
    parser.add_argument("--output", "-o", type=Path, default=Path("demo.mp4"), help="file to write (default demo.mp4)")


def run(args: argparse.Namespace) -> int:
    """Start the service, stream a video with a prompt switch, stop the service; return 0, or 1 if that failed."""
    config = read_service(args, grpc_port=free_port(), http_port=free_port())
    first, second = (build_update([parse_prompt(text)], {}, prompt_id=f"demo-{n}") for n, text in enumerate(PROMPTS))
    viewer = Viewer([ScriptLine(2, SWITCH_S, second)], FRAMES, quiet=False)
    with ends_in_order():
        try:
            _say(f"starting the service: preset {config.preset}, four deployments on this machine ...")
            start = time.perf_counter()
            with local_service(config, verbose=args.verbose) as service:
                _say(f"ready on {service.address} after {time.perf_counter() - start:.1f} s; streaming ...")
                status = view(
                    VideoClient(service.address),
                    StreamOptions(prompt=first, seed=SEED, pacing="as_fast_as_possible"),
                    viewer,
                    args.output,
                )
                _say("stopping the service ...")
        except KeyboardInterrupt:
            _say("interrupted; everything that was started has been stopped")
            return EXIT_INTERRUPTED
    if status == 0:
        print(viewer.measured.summary())
        print(f"wrote           {args.output}")
    return status


def _say(text: str) -> None:
    print(text, file=sys.stderr)
