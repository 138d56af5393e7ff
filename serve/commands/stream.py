"""`causal-forcing stream`: receive a video from a running service."""

from __future__ import annotations

import argparse
from pathlib import Path

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import FRAMES_PER_SECOND
from causal_forcing.prompts import SwitchPolicy
from causal_forcing.script import ScriptLine, build_update, parse_duration, parse_prompt, read_script
from serve.client import StreamOptions, VideoClient, VideoServiceError
from serve.client.events import PACINGS, STILL_CODECS
from serve.commands.connecting import add_connection_arguments, connect, failed
from serve.commands.viewing import Viewer

DEFAULT_SECONDS = 5.0
"""Length of a video, or of what follows the last line of a script, when none is asked for."""

EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stream`."""
    add_connection_arguments(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", action="append", metavar="TEXT[::WEIGHT]", help="what to show; several are blended")
    text.add_argument("--script", type=Path, help="file of timed prompts: lines such as `8s it starts to snow`")
    parser.add_argument("--policy", help=f"what a switch keeps: {', '.join(SwitchPolicy)}")
    parser.add_argument("--seconds", help="seconds of video, e.g. 5, 2.5 or 1m10s (default 5, or 5 after the script)")
    parser.add_argument("--output", "-o", type=Path, help=".mp4, .gif, .png or name_%%05d.png (default: none)")
    parser.add_argument("--size", metavar="HxW", help="pixels, one of the server's sizes (default: its first)")
    parser.add_argument("--seed", type=int, help="source of all noise (default: the server draws one)")
    parser.add_argument("--steps", metavar="T,T,...", help="denoising steps, descending, e.g. 1000,750,500,250")
    parser.add_argument("--window", type=int, metavar="FRAMES", help="latent frames that the model looks back on")
    parser.add_argument("--sink", type=int, metavar="FRAMES", help="earliest latent frames that it never forgets")
    parser.add_argument("--codec", choices=list(STILL_CODECS), default="jpeg", help="how frames travel (default jpeg)")
    parser.add_argument("--jpeg-quality", type=int, help="1 to 100 (default 90)")
    parser.add_argument("--credit", type=int, metavar="CHUNKS", help="chunks the server may be ahead (default 2)")
    parser.add_argument("--pacing", choices=list(PACINGS), help="whether to keep the video's time (default realtime)")
    parser.add_argument("--quiet", action="store_true", help="print the numbers only")


def run(args: argparse.Namespace) -> int:
    """Receive the video and print how that felt; return 0, 1 if the session failed, 130 if it was interrupted."""
    lines = _lines(args)
    options = stream_options(args, lines[0])
    viewer = Viewer(lines[1:], _max_frames(args.seconds, lines), quiet=args.quiet)
    status = view(connect(args), options, viewer, args.output)
    print(viewer.measured.summary())
    return status


def view(client: VideoClient, options: StreamOptions, viewer: Viewer, output: Path | None) -> int:
    """Run one session and write its frames to a file, if one is given; return an exit status.

    What has come before a failure or an interrupt is kept.

    Raises:
        InvalidRequest: If nothing can be written there.
    """
    if output is None:
        return _watch(client, options, viewer)
    from causal_forcing.media import open_writer

    writer = viewer.sink = open_writer(output)
    try:
        status = _watch(client, options, viewer)
    except BaseException:
        writer.discard()
        raise
    if writer.frame_count:
        writer.close()
    else:
        writer.discard()
    return status


def _watch(client: VideoClient, options: StreamOptions, viewer: Viewer) -> int:
    try:
        with client, client.stream(options) as session:
            viewer.watch(session)
    except VideoServiceError as error:
        return failed("stream", error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def stream_options(args: argparse.Namespace, first: ScriptLine) -> StreamOptions:
    """Return what the options ask for.

    Raises:
        InvalidRequest: If an option is not understood.
    """
    height, width = _numbers("size", args.size, "x", "must be HxW, e.g. 480x832", 2) if args.size else (None, None)
    allowed = "must be numbers separated by commas, e.g. 1000,750,500,250"
    return StreamOptions(
        prompt=first.update,
        height=height,
        width=width,
        seed=args.seed,
        denoising_steps=_numbers("steps", args.steps, ",", allowed) if args.steps else (),
        window_frames=args.window,
        sink_frames=args.sink,
        codec=args.codec,
        jpeg_quality=args.jpeg_quality,
        credit_chunks=args.credit,
        pacing=args.pacing,
    )


def _lines(args: argparse.Namespace) -> tuple[ScriptLine, ...]:
    defaults = {"policy": args.policy} if args.policy else {}
    if args.script is not None:
        return read_script(args.script, defaults=defaults)
    if args.policy:
        raise InvalidRequest("policy", args.policy, "has no effect without a --script that switches prompts")
    update = build_update([parse_prompt(text) for text in args.prompt], {}, prompt_id="prompt-0")
    return (ScriptLine(1, 0.0, update),)


def _max_frames(seconds: str | None, lines: tuple[ScriptLine, ...]) -> int:
    if seconds is None:
        return round((lines[-1].time_s + DEFAULT_SECONDS) * FRAMES_PER_SECOND)
    length_s = parse_duration(seconds if seconds[-1:].isalpha() else f"{seconds}s")
    if length_s <= lines[-1].time_s:
        raise InvalidRequest("seconds", seconds, f"must be more than the script's last time ({lines[-1].time_s:g}s)")
    return round(length_s * FRAMES_PER_SECOND)


def _numbers(field: str, text: str, separator: str, allowed: str, count: int | None = None) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(separator))
    except ValueError:
        raise InvalidRequest(field, text, allowed) from None
    if count is not None and len(values) != count:
        raise InvalidRequest(field, text, allowed)
    return values
