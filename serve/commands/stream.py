"""`causal-forcing stream`: receive a video from a running service."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import FRAMES_PER_SECOND
from causal_forcing.prompts import SwitchPolicy
from causal_forcing.script import ScriptLine, build_update, parse_duration, parse_prompt, read_script
from serve.client import StreamOptions, VideoClient, VideoServiceError, VideoSession
from serve.client.events import CODECS, PACINGS, SLOW_CLIENT_POLICIES
from serve.commands.connecting import add_connection_arguments, connect, failed
from serve.commands.live_line import LiveLine
from serve.commands.typed import HELP, Typed
from serve.commands.viewing import Viewer
from serve.metrics import SILENT
from serve.metrics.client import ClientMeter, client_metrics

DEFAULT_SECONDS = 5.0
"""Length of a video, or of what follows the last line of a script or the last one typed, when none is asked for."""

MAX_IMAGE_BYTES = 4 << 20
"""Largest start image that a service takes."""

MAX_FPS = 60
"""Highest rate that a service takes."""

EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stream`."""
    add_connection_arguments(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", action="append", metavar="TEXT[::WEIGHT]", help="what to show; several are blended")
    text.add_argument("--script", type=Path, help="file of timed prompts: lines such as `8s it starts to snow`")
    parser.add_argument("--interactive", "-i", action="store_true", help=f"while it runs, {HELP}")
    parser.add_argument("--policy", help=f"what a switch keeps: {', '.join(SwitchPolicy)}")
    parser.add_argument(
        "--seconds",
        help="seconds of video, e.g. 5, 2.5 or 1m10s (default 5, or 5 after the script or the end of what is typed)",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        help=".mp4, .gif, .png or name_%%05d.png (default: none); H.264 goes to .mp4 as it came, or Annex B to .h264",
    )
    parser.add_argument("--reconnect", action="store_true", help="go on with a new session when one is lost")
    live = argparse.BooleanOptionalAction
    parser.add_argument("--live", action=live, help="show live numbers (default: on a terminal)")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve this client's metrics for Prometheus")
    parser.add_argument("--quiet", action="store_true", help="print the numbers only")
    _add_session_arguments(parser.add_argument_group("the session"))


def _add_session_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--size", metavar="HxW", help="pixels, one of the server's sizes (default: its first)")
    group.add_argument("--seed", type=int, help="source of all noise (default: the server draws one)")
    group.add_argument("--image", type=Path, help="JPEG or PNG that the video starts from, at most 4 MiB")
    group.add_argument("--steps", metavar="T,T,...", help="denoising steps, descending, e.g. 1000,750,500,250")
    group.add_argument("--window", type=int, metavar="FRAMES", help="latent frames that the model looks back on")
    group.add_argument("--sink", type=int, metavar="FRAMES", help="earliest latent frames that it never forgets")
    group.add_argument("--codec", choices=list(CODECS), default="jpeg", help="how frames travel (default jpeg)")
    group.add_argument("--jpeg-quality", type=int, help="1 to 100 (default 90)")
    group.add_argument("--bit-rate", type=int, metavar="BITS", help="of H.264, a second (default 2000000)")
    group.add_argument("--keyframe-interval", type=int, metavar="FRAMES", help="of H.264 (default 64)")
    group.add_argument("--fps", type=int, help="frames a second of the video, 1 to 60 (default 16)")
    group.add_argument("--pacing", choices=list(PACINGS), help="whether to keep the video's time (default realtime)")
    group.add_argument("--credit", type=int, metavar="CHUNKS", help="chunks the server may be ahead (default 2)")
    group.add_argument(
        "--slow-client",
        choices=list(SLOW_CLIENT_POLICIES),
        help="what happens when this machine does not keep up: wait, or miss frames (default lossless)",
    )


def run(args: argparse.Namespace) -> int:
    """Receive the video and print how that felt; return 0, 1 if the session failed, 130 if it was interrupted."""
    if args.reconnect and args.codec == "h264_fmp4" and args.output is not None:
        allowed = "cannot be with codec h264_fmp4 and an output: a second video's time begins anew; use h264_annexb"
        raise InvalidRequest("reconnect", True, allowed)
    lines = _lines(args)
    options = stream_options(args, lines[0])
    fps = _fps(options)
    shows_live = sys.stderr.isatty() and not args.quiet if args.live is None else args.live
    live_line = LiveLine(sys.stderr, fps) if shows_live else None
    viewer = Viewer(lines[1:], _max_frames(args, lines, fps), quiet=args.quiet, fps=fps, live_line=live_line)
    typed = _typed(args, viewer) if args.interactive else None
    served = nullcontext(SILENT) if args.metrics_port is None else client_metrics(args.metrics_port)
    with served as recorder:
        viewer.meter = ClientMeter(recorder)
        status = view(connect(args), options, viewer, args.output, typed, reconnect=args.reconnect)
        viewer.meter.ended(failed=status not in (0, EXIT_INTERRUPTED))
    print(viewer.measured.summary())
    return status


def view(
    client: VideoClient,
    options: StreamOptions,
    viewer: Viewer,
    output: Path | None,
    typed: Typed | None = None,
    *,
    reconnect: bool = False,
) -> int:
    """Run a session and write its frames to a file, if one is given; return an exit status.

    What has come before a failure or an interrupt is kept.

    Raises:
        InvalidRequest: If nothing can be written there.
    """
    opening = client.keep_streaming(options) if reconnect else client.stream(options)
    if output is None:
        return _watch(client, opening, viewer, typed)
    from serve.commands.recording import open_recorder

    recorder = viewer.recorder = open_recorder(output, options.codec, _fps(options))
    try:
        status = _watch(client, opening, viewer, typed)
    except BaseException:
        recorder.discard()
        raise
    if recorder.frame_count:
        recorder.close()
    else:
        recorder.discard()
    return status


def _watch(
    client: VideoClient, opening: AbstractContextManager[VideoSession], viewer: Viewer, typed: Typed | None
) -> int:
    try:
        with client, opening as session:
            viewer.watch(session, typed)
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
        slow_client_policy=args.slow_client,
        frames_per_second=args.fps,
        h264_bit_rate=args.bit_rate,
        h264_keyframe_interval_frames=args.keyframe_interval,
        start_image=_image(args.image) if args.image else b"",
    )


def _fps(options: StreamOptions) -> int:
    fps = options.frames_per_second
    if fps is None:
        return FRAMES_PER_SECOND
    if not 1 <= fps <= MAX_FPS:
        raise InvalidRequest("fps", fps, f"must be an integer from 1 to {MAX_FPS}")
    return fps


def _image(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest("image", str(path), f"cannot be read ({error.strerror})") from error
    if not data or len(data) > MAX_IMAGE_BYTES:
        raise InvalidRequest("image", str(path), f"must have 1 to {MAX_IMAGE_BYTES} bytes")
    return data


def _typed(args: argparse.Namespace, viewer: Viewer) -> Typed:
    viewer.say(HELP)
    return Typed(
        sys.stdin,
        _defaults(args),
        send=viewer.send,
        say=viewer.say,
        at_end=lambda: viewer.finish_in(DEFAULT_SECONDS),
    )


def _defaults(args: argparse.Namespace) -> dict[str, str]:
    return {"policy": args.policy} if args.policy else {}


def _lines(args: argparse.Namespace) -> tuple[ScriptLine, ...]:
    if args.script is not None:
        return read_script(args.script, defaults=_defaults(args))
    if args.policy and not args.interactive:
        raise InvalidRequest(
            "policy", args.policy, "has no effect on one prompt: --script or --interactive switch prompts"
        )
    update = build_update([parse_prompt(text) for text in args.prompt], {}, prompt_id="prompt-0")
    return (ScriptLine(1, 0.0, update),)


def _max_frames(args: argparse.Namespace, lines: tuple[ScriptLine, ...], fps: int) -> int | None:
    """Return the length of the video; None until what is typed ends it."""
    seconds: str | None = args.seconds
    if seconds is None:
        return None if args.interactive else round((lines[-1].time_s + DEFAULT_SECONDS) * fps)
    length_s = parse_duration(seconds if seconds[-1:].isalpha() else f"{seconds}s")
    if length_s <= lines[-1].time_s:
        raise InvalidRequest("seconds", seconds, f"must be more than the script's last time ({lines[-1].time_s:g}s)")
    return round(length_s * fps)


def _numbers(field: str, text: str, separator: str, allowed: str, count: int | None = None) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(separator))
    except ValueError:
        raise InvalidRequest(field, text, allowed) from None
    if count is not None and len(values) != count:
        raise InvalidRequest(field, text, allowed)
    return values
