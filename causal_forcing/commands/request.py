"""What `generate` was asked for, read from its options and checked before any weights are loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from causal_forcing.config import MAX_SEED, SessionConfig
from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import FRAMES_PER_SECOND
from causal_forcing.presets import PRESETS, Preset, get_preset
from causal_forcing.prompts import Blend, SwitchPolicy
from causal_forcing.record import RestoreMode, SessionRecord
from causal_forcing.script import (
    ScheduledPrompt,
    ScriptLine,
    Timeline,
    build_update,
    parse_duration,
    parse_prompt,
    read_script,
    schedule,
)

DEFAULT_PRESET = "tiny"
"""The embedded model: needs no download."""

DEFAULT_SECONDS = 5.0
"""Length of a video, or of what follows the last line of a script, when none is asked for."""

MAX_CHUNKS = 10_000_000
"""Most chunks one command may be asked for."""

RECORD_SUFFIX = ".safetensors"
"""Suffix that tells a session record from a video."""


@dataclass(frozen=True)
class GenerateRequest:
    """A checked request.

    Attributes:
        preset: The model.
        config: Of the session.
        prompts: Prompts and their chunks; empty only when a record is continued under the prompt in force.
        chunks: Chunks to generate.
        frames: Pixel frames of the file.
        output: File to write.
        vae: Type of the decoder.
        image: Start image, or None.
        video: Video to continue, or None.
        record: Session record to continue, or None.
        restore: How the record becomes a session.
        save_record: Where to write the session's record, or None.
    """

    preset: Preset
    config: SessionConfig
    prompts: tuple[ScheduledPrompt, ...]
    chunks: int
    frames: int
    output: Path
    vae: str
    image: Path | None
    video: Path | None
    record: SessionRecord | None
    restore: RestoreMode
    save_record: Path | None

    def notes(self) -> dict[str, str]:
        """Return the texts that go into the file; prompts stay out of it."""
        config = self.config
        steps = ",".join(map(str, config.denoising_steps))
        comment = f"vae {self.vae}, {config.height}x{config.width}, steps {steps}, seed {config.seed}"
        if not self.preset.trained:
            comment = f"RANDOM WEIGHTS: this model has not been trained. {comment}"
        return {"title": f"Causal Forcing, preset {self.preset.name}", "comment": comment}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to generate."""
    text = parser.add_argument_group("what to show")
    text.add_argument(
        "--prompt", action="append", metavar="TEXT[::WEIGHT]", help="what to show; several are blended by weight"
    )
    text.add_argument("--script", type=Path, help="file of timed prompts: lines such as `8s it starts to snow`")
    text.add_argument("--blend", help=f"how several prompts are mixed: {', '.join(Blend)} (default linear)")
    text.add_argument("--policy", help=f"what a prompt switch keeps: {', '.join(SwitchPolicy)}")
    text.add_argument("--transition", metavar="CHUNKS", help="chunks over which a switch is blended (default 0)")
    text.add_argument("--transition-blend", help=f"how a transition interpolates: {', '.join(Blend)} (default linear)")
    text.add_argument("--image", type=Path, help="PNG, JPEG or WebP to start from")
    text.add_argument(
        "--continue-from", type=Path, metavar="FILE", help=f"video, or session record ({RECORD_SUFFIX}), to continue"
    )
    text.add_argument("--restore", help="how a record becomes a session: fast (default) or exact")
    model = parser.add_argument_group("how")
    model.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default tiny)")
    model.add_argument("--vae", default="wan", help="type of the decoder: wan (default), lightvae, tae, lighttae")
    model.add_argument("--size", metavar="HxW", help="pixels, multiples of 16, e.g. 480x832 (default: the preset's)")
    model.add_argument("--seed", help=f"0 to {MAX_SEED} (default 42)")
    model.add_argument("--steps", metavar="T,T,...", help="denoising steps, descending, e.g. 1000,750,500,250")
    model.add_argument("--first-chunk-steps", metavar="T,T,...", help="steps of the first chunk (default: the same)")
    model.add_argument("--window", metavar="FRAMES", help="latent frames that attention sees, or none to keep all")
    model.add_argument("--sink", metavar="FRAMES", help="earliest latent frames that are never evicted")
    model.add_argument("--sink-rope", help="where the sink is rotated to: relative (endless) or fixed (the reference)")
    model.add_argument("--anchor-every", metavar="CHUNKS", help="rebuild the cache so often, to bound an exact restore")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", help="seconds of video, e.g. 5, 2.5 or 1m10s (default 5, or 5 after the script)")
    length.add_argument("--chunks", help="chunks to generate instead")
    parser.add_argument("--output", "-o", type=Path, default=Path("out.mp4"), help=".mp4, .gif, .png or name_%%05d.png")
    parser.add_argument(
        "--save-record", type=Path, metavar="FILE", help=f"also write the session's record ({RECORD_SUFFIX})"
    )


def read_request(args: argparse.Namespace) -> GenerateRequest:
    """Return the request that the options make.

    Raises:
        InvalidRequest: A value is not allowed, or an option could have no effect.
    """
    source: Path | None = args.continue_from
    is_record = source is not None and source.suffix == RECORD_SUFFIX
    _refuse_idle_options(args, is_record=is_record)
    record = SessionRecord.load(source) if source is not None and is_record else None
    preset = get_preset(args.preset or (record.preset if record else DEFAULT_PRESET))
    preset.vae_config(args.vae)
    past = sum(chunk.frames for chunk in record.chunks) if record else int(bool(args.image or source))
    timeline = schedule(
        _read_lines(args, is_record=is_record),
        chunk_frames=preset.chunk_frames,
        given_frames=past,  # of a video that is continued, any number: none of them is shown
        given_shown=source is None,
        first_switches=is_record,
    )
    chunks, frames = _read_length(args, timeline)
    config = record.config if record else preset.session_config(**_read_overrides(args))
    if config.window_frames is None:
        given = preset.window_frames if source is not None and not is_record else past
        config = replace(config, max_frames=given + preset.chunk_frames * chunks)
    return GenerateRequest(
        preset=preset,
        config=config,
        prompts=timeline.prompts,
        chunks=chunks,
        frames=frames,
        output=args.output,
        vae=args.vae,
        image=args.image,
        video=None if is_record else source,
        record=replace(record, config=config) if record else None,
        restore=_restore_mode(args.restore),
        save_record=args.save_record,
    )


def _refuse_idle_options(args: argparse.Namespace, *, is_record: bool) -> None:
    """Raise for options that could have no effect."""
    if args.prompt and args.script:
        raise InvalidRequest("script", str(args.script), "give either --script or --prompt, not both")
    if args.image and args.continue_from:
        raise InvalidRequest("image", str(args.image), "give either --image or --continue-from, not both")
    if args.save_record and (args.save_record.suffix != RECORD_SUFFIX or not args.save_record.parent.is_dir()):
        raise InvalidRequest(
            "save_record", str(args.save_record), f"must end in {RECORD_SUFFIX}, in an existing folder"
        )
    if args.restore and not is_record:
        raise InvalidRequest("restore", args.restore, f"has an effect only with --continue-from FILE{RECORD_SUFFIX}")
    if is_record:
        fixed = ("size", "seed", "steps", "first_chunk_steps", "window", "sink", "sink_rope", "anchor_every")
        for name in fixed:
            if getattr(args, name) is not None:
                raise InvalidRequest(name, getattr(args, name), "cannot be changed: the record being continued has it")
    elif not args.prompt and not args.script:
        raise InvalidRequest("prompt", None, "give --prompt TEXT or --script FILE")
    if args.blend and len(args.prompt or ()) < 2:
        raise InvalidRequest("blend", args.blend, "has an effect only with two or more --prompt")


def _read_lines(args: argparse.Namespace, *, is_record: bool) -> tuple[ScriptLine, ...]:
    names = ("policy", "transition", "transition_blend", "blend")
    options: dict[str, str] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    lines: tuple[ScriptLine, ...] = ()
    if args.script:
        lines = read_script(args.script, defaults=options)
    elif args.prompt:
        prompts = [parse_prompt(text) for text in args.prompt]
        lines = (ScriptLine(0, 0.0, build_update(prompts, options, prompt_id="prompt")),)
    switches = len(lines) if is_record else len(lines) - 1
    for name in ("policy", "transition", "transition_blend"):
        if name in options and switches < 1:
            raise InvalidRequest(name, options[name], "has an effect only when the prompt changes: use --script")
    return lines


def _read_length(args: argparse.Namespace, timeline: Timeline) -> tuple[int, int]:
    """Return the chunks to generate, at least one, and the pixel frames of the file."""
    scene = timeline.last_scene
    if args.chunks is not None:
        chunks = _integer("chunks", args.chunks, 1, MAX_CHUNKS)
        timeline.require_all_shown(chunks)
        return chunks, scene.start_of(chunks)
    seconds = DEFAULT_SECONDS + (timeline.prompts[-1].line.time_s if timeline.prompts else 0.0)
    if args.seconds is not None:
        plain = args.seconds.replace(".", "", 1).isdecimal()
        seconds = parse_duration(f"{args.seconds}s" if plain else args.seconds, field="seconds")
        if not seconds:
            raise InvalidRequest("seconds", args.seconds, "must be more than 0")
    frames = math.ceil(seconds * FRAMES_PER_SECOND - 1e-6)
    chunks = max(1, scene.chunk_from(frames))
    timeline.require_all_shown(chunks)
    return chunks, frames


def _read_overrides(args: argparse.Namespace) -> Mapping[str, Any]:
    overrides: dict[str, Any] = {}
    if args.size is not None:
        rows, mark, columns = args.size.lower().partition("x")
        if not (mark and rows.isdecimal() and columns.isdecimal()):
            raise InvalidRequest("size", args.size, "must be HEIGHTxWIDTH in pixels, e.g. 480x832")
        overrides |= {"height": int(rows), "width": int(columns)}
    for option, name in (("steps", "denoising_steps"), ("first_chunk_steps", "first_chunk_steps")):
        text: str | None = getattr(args, option)
        if text is not None:
            parts = text.split(",")
            if not all(part.strip().isdecimal() for part in parts):
                raise InvalidRequest(option, text, "must be integers separated by commas, e.g. 1000,500")
            overrides[name] = tuple(int(part) for part in parts)
    if args.window is not None:
        overrides["window_frames"] = None if args.window == "none" else _integer("window", args.window, 1, 1024)
    if args.seed is not None:
        overrides["seed"] = _integer("seed", args.seed, 0, MAX_SEED)
    if args.sink is not None:
        overrides["sink_frames"] = _integer("sink", args.sink, 0, 1024)
    if args.sink_rope is not None:
        overrides["sink_rope"] = args.sink_rope
    if args.anchor_every is not None:
        overrides["anchor_every_chunks"] = _integer("anchor_every", args.anchor_every, 1, 1_000_000)
    return overrides


def _integer(field: str, text: str, low: int, high: int) -> int:
    if not text.strip().isdecimal() or not low <= int(text) <= high:
        raise InvalidRequest(field, text, f"must be an integer from {low} to {high}")
    return int(text)


def _restore_mode(text: str | None) -> RestoreMode:
    try:
        return RestoreMode(text or RestoreMode.FAST)
    except ValueError:
        raise InvalidRequest("restore", text, f"must be one of {', '.join(RestoreMode)}") from None
