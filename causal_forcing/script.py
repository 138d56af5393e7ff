"""Reads timed prompt scripts and says at which chunk each prompt takes effect.

A script has one line a prompt: a time, options in brackets if any, and the prompt. Empty lines and lines that begin
with ``#`` are skipped. Several prompts on a line are blended: ``text::weight | text::weight``.

    # a fox's afternoon
    0s     a red fox in a forest
    8s     [transition=4 policy=recache] it starts to snow
    1m10s  [blend=slerp] a red fox::0.3 | a white wolf::0.7
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import FRAMES_PER_SECOND, pixel_frames
from causal_forcing.prompts import Blend, PromptUpdate, SwitchPolicy, WeightedPrompt

MAX_SCRIPT_BYTES = 1024 * 1024
"""Largest accepted script file."""

MAX_TIME_S = 7 * 24 * 3600
"""Latest accepted time of a line."""

_DURATION = re.compile(r"(?=\d)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6}(?:\.\d{1,6})?)s)?")
_LINE = re.compile(r"(?P<time>\S+)\s*(?P<update>.*)")
_UPDATE = re.compile(r"(?:\[(?P<options>[^\]]*)\])?\s*(?P<text>.*)")
_TIME_ALLOWED = "must be a time such as 8s, 1.5s or 1m10s, at most 168h"
_SCRIPT_REASON = "INVALID_SCRIPT"


@dataclass(frozen=True)
class ScriptLine:
    """One prompt of a script.

    Attributes:
        number: Line of the file, from 1; 0 if the prompt is of no file.
        time_s: When the prompt takes effect, in seconds of video.
        update: The prompt, as a session takes it.
    """

    number: int
    time_s: float
    update: PromptUpdate


@dataclass(frozen=True)
class ScheduledPrompt:
    """A prompt and the chunk it takes effect at.

    Attributes:
        chunk: Index of the first chunk made under the prompt.
        line: The prompt.
    """

    chunk: int
    line: ScriptLine


@dataclass(frozen=True)
class Scene:
    """Frames since the decoder was last fresh.

    Attributes:
        chunk: First chunk generated in the scene.
        frame: Pixel frame of the video at which the scene begins.
        latents: Latent frames of the scene before that chunk.
        chunk_frames: Latent frames a chunk.
    """

    chunk: int
    frame: int
    latents: int
    chunk_frames: int

    def start_of(self, chunk: int) -> int:
        """Return the pixel frame at which a chunk of the scene starts, and the one before it ends."""
        return self.frame + pixel_frames(self.latents + (chunk - self.chunk) * self.chunk_frames, first=True)

    def chunk_from(self, frame: int) -> int:
        """Return the first chunk of the scene that starts at or after a pixel frame."""
        if frame <= self.start_of(self.chunk):
            return self.chunk
        later = frame - self.start_of(self.chunk + 1)
        return self.chunk + 1 + max(0, math.ceil(later / pixel_frames(self.chunk_frames, first=False)))


@dataclass(frozen=True)
class Timeline:
    """When the prompts of a video take effect.

    Attributes:
        prompts: In order.
        last_scene: The scene that the video ends in.
    """

    prompts: tuple[ScheduledPrompt, ...]
    last_scene: Scene

    def require_all_shown(self, chunks: int) -> None:
        """Raise unless a video of so many chunks shows every prompt.

        Raises:
            InvalidRequest: The last prompt's chunk is not made.
        """
        if not self.prompts or self.prompts[-1].chunk < chunks:
            return
        chunk, line = self.prompts[-1].chunk, self.prompts[-1].line
        start_s = self.last_scene.start_of(chunk) / FRAMES_PER_SECOND
        raise InvalidRequest(
            f"script line {line.number}",
            f"{line.time_s:g}s",
            f"takes effect at {start_s:.10g}s, when the video is over: ask for more than {start_s:.10g} seconds, "
            f"or than {chunk} chunks",
            reason=_SCRIPT_REASON,
        )


def parse_duration(text: str, *, field: str = "seconds") -> float:
    """Return a duration such as ``8s``, ``1.5s`` or ``1m10s`` in seconds.

    Raises:
        InvalidRequest: It is not one, or longer than a week.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(field, text, _TIME_ALLOWED, reason=_SCRIPT_REASON)
    hours, minutes, seconds = match.groups(default="0")
    time_s = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    if time_s > MAX_TIME_S:
        raise InvalidRequest(field, text, _TIME_ALLOWED, reason=_SCRIPT_REASON)
    return time_s


def parse_prompt(text: str) -> WeightedPrompt:
    """Return a prompt given as ``text`` or ``text::weight``.

    Raises:
        InvalidRequest: The text is blank or too long, or the weight is not a number from 0 to 1,000,000.
    """
    words, mark, weight = text.rpartition("::")
    if not mark:
        return WeightedPrompt(text.strip())
    try:
        number = float(weight)
    except ValueError:
        raise InvalidRequest(
            "prompts.weight", weight, "must be a number after ::, as in a red fox::0.7", reason="INVALID_PROMPT"
        ) from None
    return WeightedPrompt(words.strip(), number)


def parse_script(text: str, *, defaults: Mapping[str, str] | None = None) -> tuple[ScriptLine, ...]:
    """Return the prompts of a script, in order.

    Args:
        text: The whole script.
        defaults: Options (``transition``, ``transition_blend``, ``policy``, ``blend``) of lines that do not give them.

    Raises:
        InvalidRequest: A line is not understood, the first is not at 0s, or the times do not increase.
    """
    lines: list[ScriptLine] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        stripped = raw.strip()
        if not stripped or stripped.startswith("#"):
            continue
        with naming_line(number, stripped):
            line = _parse_line(number, stripped, defaults or {})
            _check_order(lines, line)
        lines.append(line)
    if not lines:
        raise InvalidRequest(
            "script",
            f"{len(text)} characters",
            "must have at least one line such as 0s a red fox",
            reason=_SCRIPT_REASON,
        )
    return tuple(lines)


@contextmanager
def naming_line(number: int, shown: str) -> Iterator[None]:
    """Let what the enclosed code refuses name a line of the script; line 0, which is of no script, is not named.

    Raises:
        InvalidRequest: In place of the enclosed code's own.
    """
    try:
        yield
    except InvalidRequest as error:
        if not number:
            raise
        raise InvalidRequest(f"script line {number}", shown, error.message, reason=error.reason) from error


def read_script(path: str | Path, *, defaults: Mapping[str, str] | None = None) -> tuple[ScriptLine, ...]:
    """Return the prompts of a script file; see :func:`parse_script`.

    Raises:
        InvalidRequest: The file cannot be read, is not UTF-8, is larger than 1 MiB, or is not a script.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_SCRIPT_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        allowed = f"cannot be read ({error.strerror}); must be a text file"
        raise InvalidRequest("script", str(path), allowed, reason=_SCRIPT_REASON) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("script", str(path), "must be UTF-8 text", reason=_SCRIPT_REASON) from error
    if len(data) > MAX_SCRIPT_BYTES:
        raise InvalidRequest("script", str(path), "must be at most 1 MiB", reason=_SCRIPT_REASON)
    return parse_script(text, defaults=defaults)


def schedule(
    lines: Sequence[ScriptLine],
    *,
    chunk_frames: int,
    given_frames: int = 0,
    given_shown: bool = True,
    first_switches: bool = False,
) -> Timeline:
    """Return the chunk at which each line takes effect: the first chunk that starts at or after the line's time.

    A scene cut begins with a latent frame that decodes to one pixel frame, so it moves the chunks that follow.

    Args:
        lines: A parsed script.
        chunk_frames: Latent frames a chunk.
        given_frames: Latent frames the stream begins with (a start image has one); chunk 0 follows them.
        given_shown: Whether the given frames are part of the video, whose time is counted from their start.
        first_switches: Whether the given frames are of another prompt, from which the first line switches: if it cuts,
            they are of another scene, too.

    Raises:
        InvalidRequest: Two lines fall on the same chunk.
    """
    scheduled: list[ScheduledPrompt] = []
    first_frame = 0 if given_shown else -pixel_frames(given_frames, first=True)
    scene = Scene(chunk=0, frame=first_frame, latents=given_frames, chunk_frames=chunk_frames)
    for line in lines:
        chunk = scene.chunk_from(math.ceil(line.time_s * FRAMES_PER_SECOND - 1e-6))
        if scheduled and chunk <= scheduled[-1].chunk:
            chunk_s = pixel_frames(chunk_frames, first=False) / FRAMES_PER_SECOND
            raise InvalidRequest(
                f"script line {line.number}",
                f"{line.time_s:g}s",
                f"must start a chunk of its own; a chunk lasts {chunk_s:g}s",
                reason=_SCRIPT_REASON,
            )
        if (scheduled or first_switches) and line.update.policy is SwitchPolicy.SCENE_CUT:
            scene = Scene(chunk, scene.start_of(chunk), latents=0, chunk_frames=chunk_frames)
        scheduled.append(ScheduledPrompt(chunk, line))
    return Timeline(tuple(scheduled), scene)


def _parse_line(number: int, text: str, defaults: Mapping[str, str]) -> ScriptLine:
    match = _LINE.fullmatch(text)
    assert match is not None, "every line without a line break matches"
    time_s = parse_duration(match["time"], field="time")
    return ScriptLine(number, time_s, parse_update(match["update"], defaults, prompt_id=f"line-{number}"))


def parse_update(text: str, defaults: Mapping[str, str], *, prompt_id: str) -> PromptUpdate:
    """Return a prompt update from a line without its time, such as ``[transition=4] a fox::0.3 | a wolf::0.7``.

    Args:
        text: Options in brackets, if any, and prompts.
        defaults: Options that apply where the line does not give them.
        prompt_id: Name of the update.

    Raises:
        InvalidRequest: It is not understood, or not allowed.
    """
    match = _UPDATE.fullmatch(text)
    if match is None:
        raise InvalidRequest("prompt", text, "must be one line", reason=_SCRIPT_REASON)
    options = {**defaults, **_parse_options(match["options"] or "")}
    prompts = tuple(parse_prompt(part) for part in match["text"].split("|"))
    return build_update(prompts, options, prompt_id=prompt_id)


def build_update(prompts: Sequence[WeightedPrompt], options: Mapping[str, str], *, prompt_id: str) -> PromptUpdate:
    """Return a prompt update from options given as text.

    Args:
        prompts: What to show.
        options: Any of ``transition`` (chunks), ``transition_blend``, ``policy`` and ``blend``.
        prompt_id: Name of the update.

    Raises:
        InvalidRequest: An option has a value that is not allowed.
    """
    transition = options.get("transition", "0")
    return PromptUpdate(
        prompts=tuple(prompts),
        blend=options.get("blend", Blend.LINEAR),  # type: ignore[arg-type]  # PromptUpdate checks and converts
        transition_chunks=int(transition) if transition.isdecimal() else transition,  # type: ignore[arg-type]
        transition=options.get("transition_blend", Blend.LINEAR),  # type: ignore[arg-type]
        policy=options.get("policy", SwitchPolicy.CROSS_ATTENTION),  # type: ignore[arg-type]
        prompt_id=prompt_id,
    )


def _parse_options(text: str) -> dict[str, str]:
    known = ("transition", "transition_blend", "policy", "blend")
    options: dict[str, str] = {}
    for word in text.replace(",", " ").split():
        key, _, value = word.partition("=")
        if key not in known or not value or key in options:
            allowed = f"each of {', '.join(known)} at most once, as in [transition=4 policy=recache]"
            raise InvalidRequest("options", word, allowed, reason=_SCRIPT_REASON)
        options[key] = value
    return options


def _check_order(before: Sequence[ScriptLine], line: ScriptLine) -> None:
    if not before and line.time_s:
        raise InvalidRequest("time", f"{line.time_s:g}s", "the first prompt must be at 0s", reason=_SCRIPT_REASON)
    if before and line.time_s <= before[-1].time_s:
        raise InvalidRequest(
            "time", f"{line.time_s:g}s", f"must be later than {before[-1].time_s:g}s above", reason=_SCRIPT_REASON
        )
