"""Whether a checkpoint of the world shows what it was told: instruction following, switches, drift.

Everything runs through the production session, many in step (:mod:`causal_forcing.training.cohort`); what is on the
screen is read by :mod:`causal_forcing.training.reader`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from causal_forcing.config import SessionConfig
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import TEMPORAL_STRIDE
from causal_forcing.media import to_frames
from causal_forcing.prompts import PromptUpdate, SwitchPolicy, WeightedPrompt
from causal_forcing.training import captions, metrics, world
from causal_forcing.training.cohort import Cohort, decode
from causal_forcing.training.reader import MINIMUM_AREA, NONE, ClipReading, colour_layers, read_clip

ATTRIBUTES = ("colour", "shape", "size", "motion", "background")
READ_FRAMES = 33
"""Pixel frames that are read: one period and one more."""

CLIP_LATENTS = 12
SWITCH_AFTER = 6
SWITCH_WATCH, TRANSITION_CHUNKS = 11, 6
EARLY_LATENT = 20
DRIFT_DECODED = 20
"""Chunks that are decoded where a long stream is read: nine are read, the others prepare the decoder."""

HALF = 0.5
BLEND_SHARES = (0.25, 0.5, 0.75)
"""Weights of the second of two prompts that are tried."""

SHEET_CLIPS = 16
"""Most clips of a contact sheet."""

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Question:
    """A prompt and what it should show; attributes that it does not mention are not judged.

    Attributes:
        prompt: What to say.
        expected: Attribute to word, some of :data:`ATTRIBUTES`.
    """

    prompt: str
    expected: Mapping[str, str]


@dataclass
class Tally:
    """How often each attribute was right.

    Attributes:
        right: By attribute.
        asked: By attribute.
        mistaken: How often an attribute's word was read as another one.
    """

    right: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    mistaken: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, question: Question, reading: ClipReading) -> None:
        """Judge one clip; a second object that nobody asked for spoils the first one's attributes."""
        seen = describe(reading)
        for attribute, word in question.expected.items():
            self.asked[attribute] = self.asked.get(attribute, 0) + 1
            self.right[attribute] = self.right.get(attribute, 0) + int(seen[attribute] == word)
            self.mistaken[attribute, word, seen[attribute]] += int(seen[attribute] != word)
        self.asked["all"] = self.asked.get("all", 0) + 1
        correct = all(seen[attribute] == word for attribute, word in question.expected.items())
        self.right["all"] = self.right.get("all", 0) + int(correct)

    def confusions(self) -> dict[str, dict[str, int]]:
        """Return, by attribute, what was asked for and read instead, ``asked > read``, most frequent first."""
        found: dict[str, dict[str, int]] = {}
        for (attribute, asked, read), count in self.mistaken.most_common():
            if count:
                found.setdefault(attribute, {})[f"{asked} > {read}"] = count
        return found

    def summary(self) -> dict[str, dict[str, float]]:
        """Return accuracy, its 95 % interval and the number of questions, by attribute."""
        result = {}
        for name, asked in self.asked.items():
            low, high = metrics.wilson(self.right[name], asked)
            result[name] = {"accuracy": self.right[name] / asked, "low": low, "high": high, "count": asked}
        return result


def describe(reading: ClipReading) -> dict[str, str]:
    """Return the words of a clip with one object; all but the background are ``none`` if there is not exactly one."""
    things = reading.things
    alone = len(things) == 1 or (len(things) > 1 and things[1].area < 0.3 * things[0].area)
    words = {name: getattr(things[0], name) if alone else NONE for name in ATTRIBUTES[:-1]}
    return words | {"background": reading.background}


def held_out_questions(count: int, seed: int = 7) -> list[Question]:
    """Return questions about held-out combinations in varied wording; scenes repeat in new words after 400."""
    rng = np.random.default_rng(seed)
    scenes = list(captions.held_out_scenes())
    questions = []
    for index in range(count):
        scene = scenes[index % len(scenes)]
        prompt = captions.caption(scene, rng)
        expected = expectation(scene)
        if not any(word in prompt.lower() for word in captions.SIZE_WORDS[scene.things[0].size]):
            expected.pop("size")
        questions.append(Question(prompt, expected))
    return questions


def expectation(scene: world.Scene) -> dict[str, str]:
    """Return what a scene of one object should be read as."""
    thing = scene.things[0]
    return {name: getattr(thing, name) for name in ATTRIBUTES[:-1]} | {"background": scene.background}


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file: one JSON object a line, ``prompt`` and any of the attributes.

    Raises:
        InvalidRequest: If a line is not such an object (field ``prompts``).
    """
    allowed = f"each line must be a JSON object with prompt and any of {', '.join(ATTRIBUTES)}"
    questions = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            raise InvalidRequest("prompts", f"line {number}", allowed) from None
        if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or set(data) - {"prompt", *ATTRIBUTES}:
            raise InvalidRequest("prompts", f"line {number}", allowed)
        questions.append(Question(data["prompt"], {name: str(data[name]) for name in ATTRIBUTES if name in data}))
    if not questions:
        raise InvalidRequest("prompts", str(path), "must hold at least one question")
    return questions


@dataclass(frozen=True)
class Evaluator:
    """Runs an engine over questions, many sessions in step.

    Attributes:
        engine: With VAE and text encoder.
        overrides: Session settings other than the preset's.
        seed: Of the first clip; each clip has its own.
        together: Sessions of a cohort.
        first: Number of the first question of these, so that a part of a list is read as in the whole.
        euler: Whether to follow the ODE by Euler's method, as a teacher needs.
    """

    engine: Engine
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    together: int = 25
    first: int = 0
    euler: bool = False

    def config(self) -> SessionConfig:
        """Return the configuration of every clip, but for the seed."""
        return self.engine.session_config(**{**self.overrides, "seed": self.seed + self.first})

    def cohorts(self, prompts: Sequence[str]) -> Iterator[tuple[slice, Cohort]]:
        """Iterate over cohorts about to begin, and which of the prompts are theirs."""
        for start in range(0, len(prompts), self.together):
            members = slice(start, min(start + self.together, len(prompts)))
            seeds = range(self.seed + self.first + members.start, self.seed + self.first + members.stop)
            cohort = Cohort(self.engine, self.config(), seeds, euler=self.euler)
            cohort.update_prompt(prompts[members])
            yield members, cohort

    def follow(self, questions: Sequence[Question], sheet: list[Frames] | None = None) -> dict[str, Any]:
        """Return accuracy by attribute, confusions, dynamic degree and flicker; 16 clips are added to ``sheet``."""
        tally, flows, flickers = Tally(), [], []
        for members, cohort in self.cohorts([question.prompt for question in questions]):
            latents = torch.cat(list(cohort.latents(CLIP_LATENTS)), dim=2)
            for question, clip in zip(questions[members], decode(self.engine, latents), strict=True):
                tally.add(question, read_clip(clip[-READ_FRAMES:]))
                flows.append(metrics.mean_flow(clip))
                flickers.append(metrics.flicker(clip))
                if sheet is not None and len(sheet) < SHEET_CLIPS:
                    sheet.append(clip)
        return {
            "attributes": tally.summary(),
            "confusions": tally.confusions(),
            "dynamic_degree": float(np.mean(flows)),
            "flicker": float(np.mean(flickers)),
        }

    def switches(self, trials: int, policy: SwitchPolicy) -> dict[str, Any]:
        """Return after how many chunks a new colour is seen, and what is read of the last two seconds.

        Every trial changes the colour alone.
        """
        pairs = list(islice(_colour_changes(), self.first, self.first + trials))
        latencies: list[int | None] = []
        tally = Tally()
        for members, cohort in self.cohorts([captions.plain_caption(before) for before, _ in pairs]):
            changed = [after for _, after in pairs[members]]
            chunks = list(cohort.latents(SWITCH_AFTER))
            cohort.update_prompt([captions.plain_caption(scene) for scene in changed], policy=policy)
            chunks += cohort.latents(SWITCH_WATCH)
            cut = policy is SwitchPolicy.SCENE_CUT
            shown = torch.cat(chunks[SWITCH_AFTER:] if cut else chunks, dim=2)
            skipped = 0 if cut else pixel_frames(SWITCH_AFTER)
            for scene, clip in zip(changed, decode(self.engine, shown), strict=True):
                latencies.append(_first_seen(_split(clip[skipped:], first=1 if cut else 4), scene.things[0].colour))
                tally.add(Question("", expectation(scene)), read_clip(clip[-READ_FRAMES:]))
        seen = [value for value in latencies if value is not None]
        within = sum(value <= 2 for value in seen)
        low, high = metrics.wilson(within, trials)
        return {
            "trials": trials,
            "within_2_chunks": within / max(1, trials),
            "low": low,
            "high": high,
            "mean_chunks": float(np.mean(seen)) if seen else None,
            "never": trials - len(seen),
            "afterwards": tally.summary(),
        }

    def blends(self, trials: int) -> dict[str, Any]:
        """Return what colour is seen under blends of two prompts, and how a slow transition between them goes.

        Both prompts of a trial differ in the colour alone. Answers are ``first``, ``second``, ``other`` or ``none``.
        """
        pairs = list(islice(_colour_changes(), self.first, self.first + trials))
        names = [(before.things[0].colour, after.things[0].colour) for before, after in pairs]
        texts = [tuple(captions.plain_caption(scene) for scene in pair) for pair in pairs]
        shares: dict[str, Counter[str]] = {}
        for share in BLEND_SHARES:
            found = shares.setdefault(f"{share:g} of the second", Counter())
            for members, cohort in self.cohorts([first for first, _ in texts]):
                cohort.submit([_blend(first, second, share) for first, second in texts[members]])
                latents = torch.cat(list(cohort.latents(CLIP_LATENTS)), dim=2)
                for pair, clip in zip(names[members], decode(self.engine, latents), strict=True):
                    found[_which(describe(read_clip(clip[-READ_FRAMES:]))["colour"], pair)] += 1
        progress = [Counter[str]() for _ in range(SWITCH_WATCH)]
        for members, cohort in self.cohorts([first for first, _ in texts]):
            chunks = list(cohort.latents(SWITCH_AFTER))
            cohort.update_prompt([second for _, second in texts[members]], transition_chunks=TRANSITION_CHUNKS)
            shown = torch.cat([*chunks, *cohort.latents(SWITCH_WATCH)], dim=2)
            for pair, clip in zip(names[members], decode(self.engine, shown), strict=True):
                for at, frames in enumerate(_split(clip[pixel_frames(SWITCH_AFTER) :], first=TEMPORAL_STRIDE)):
                    progress[at][_which(_colour_of(frames), pair)] += 1
        return {
            "trials": trials,
            "blends": {name: dict(found) for name, found in shares.items()},
            "transition_chunks": TRANSITION_CHUNKS,
            "transition": [dict(found) for found in progress],
        }

    def drift(self, questions: Sequence[Question], latents: int) -> dict[str, Any]:
        """Return accuracy by attribute around latent frame 20 and at the end of long streams, and what they have lost.

        ``kept`` is the share of attributes right at frame 20 that are right at the end, too.
        """
        early, late, kept = Tally(), Tally(), Tally()
        flickers: dict[str, list[float]] = {"early": [], "late": []}
        for members, cohort in self.cohorts([question.prompt for question in questions]):
            recent: deque[Tensor] = deque(maxlen=DRIFT_DECODED)
            windows: list[Tensor] = []
            for count, chunk in enumerate(cohort.latents(latents), start=1):
                recent.append(chunk)
                if count * chunk.shape[2] in (EARLY_LATENT, latents):
                    windows.append(torch.cat(list(recent), dim=2))
            first, last = (decode(self.engine, windows[0]), decode(self.engine, windows[-1]))
            for question, *clips in zip(questions[members], first, last, strict=True):
                read = [read_clip(clip[-READ_FRAMES:]) for clip in clips]
                early.add(question, read[0])
                late.add(question, read[1])
                kept.add(_answered(question, read[0]), read[1])
                flickers["early"].append(metrics.flicker(clips[0][-READ_FRAMES:]))
                flickers["late"].append(metrics.flicker(clips[1][-READ_FRAMES:]))
        return {
            "latents": latents,
            "early": early.summary(),
            "late": late.summary(),
            "kept": kept.summary(),
            "flicker": {name: float(np.mean(values)) if values else None for name, values in flickers.items()},
        }


def _blend(first: str, second: str, share: float) -> PromptUpdate:
    return PromptUpdate((WeightedPrompt(first, 1 - share), WeightedPrompt(second, share)))


def _which(colour: str, pair: tuple[str, str]) -> str:
    """Return whether a colour is the first or second of two, another one, or none."""
    if colour == NONE:
        return NONE
    return ("first", "second")[pair.index(colour)] if colour in pair else "other"


def pixel_frames(latents: int) -> int:
    """Return the pixel frames of so many latent frames that begin a scene."""
    return TEMPORAL_STRIDE * latents - TEMPORAL_STRIDE + 1


def _answered(question: Question, reading: ClipReading) -> Question:
    """Return the part of a question that a clip answers rightly."""
    seen = describe(reading)
    return Question(question.prompt, {name: word for name, word in question.expected.items() if seen[name] == word})


def _colour_changes() -> Iterator[tuple[world.Scene, world.Scene]]:
    """Iterate without end over scenes of one object, each before and after a change of its colour."""
    rng = np.random.default_rng(8)
    while True:
        thing = world.draw_thing(rng)
        colour = str(rng.choice([name for name in world.COLOURS if name != thing.colour]))
        background = str(rng.choice(world.BACKGROUNDS))
        yield world.Scene(background, (thing,)), world.Scene(background, (dataclasses.replace(thing, colour=colour),))


def _split(frames: Frames, first: int) -> Iterator[Frames]:
    """Iterate over the pixel frames of each latent frame; the first has one if it begins a scene."""
    yield frames[:first]
    for start in range(first, len(frames), TEMPORAL_STRIDE):
        yield frames[start : start + TEMPORAL_STRIDE]


def _first_seen(chunks: Iterable[Frames], colour: str) -> int | None:
    """Return the number (from 1) of the first chunk half of whose frames show a colour, or None."""
    return next((number for number, frames in enumerate(chunks, start=1) if _colour_of(frames) == colour), None)


def _colour_of(frames: Frames) -> str:
    """Return the palette colour that covers most in at least half of some frames, or none."""
    layers = colour_layers((frames / 255).astype(np.float32)).sum((2, 3))
    shown = np.mean((layers > MINIMUM_AREA) & (layers == layers.max(0)), axis=1)
    return list(world.COLOURS)[int(shown.argmax())] if shown.max() >= HALF else NONE


def validate_reader(count: int = 200, *, blur: float = 0.0, seed: int = 9) -> dict[str, dict[str, float]]:
    """Return the reader's own accuracy on drawn clips.

    Args:
        count: Clips.
        blur: Standard deviation of a Gaussian blur in pixels; 0 for none.
        seed: Of the clips.
    """
    rng, tally = np.random.default_rng(seed), Tally()
    for _ in range(count):
        scene = world.draw_scene(rng)
        clip = world.render(world.draw_clip(rng, scene, READ_FRAMES))
        tally.add(Question("", expectation(scene)), read_clip(blurred(clip, blur) if blur else clip))
    return tally.summary()


def blurred(clip: Frames, deviation: float) -> Frames:
    """Return a clip with every frame blurred."""
    from PIL import Image, ImageFilter

    kernel = ImageFilter.GaussianBlur(deviation)
    return np.stack([np.asarray(Image.fromarray(frame).filter(kernel)) for frame in clip])


@torch.inference_mode()
def validate_vae(engine: Engine, count: int = 50, seed: int = 9) -> dict[str, Any]:
    """Return the reader's accuracy on drawn clips that went through the engine's VAE, and their PSNR in decibels."""
    assert engine.vae is not None
    rng, tally, errors = np.random.default_rng(seed), Tally(), []
    for _ in range(count):
        scene = world.draw_scene(rng)
        clip = world.render(world.draw_clip(rng, scene, READ_FRAMES))
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        latents = engine.vae.encode(video)
        geometry = engine.session_config().geometry
        drawn = to_frames(engine.vae.decode(latents, engine.vae.new_decoder_state(geometry)))
        tally.add(Question("", expectation(scene)), read_clip(drawn))
        errors.append(float(np.square((drawn.astype(np.float32) - clip) / 255).mean()))
    return {"attributes": tally.summary(), "psnr_db": float(-10 * np.log10(np.mean(errors)))}
