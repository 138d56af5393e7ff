"""`causal-forcing evaluate`: how well a checkpoint of the embedded model's world does what it is told."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from causal_forcing.config import SessionConfig, SinkRope
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest
from causal_forcing.presets import get_preset
from causal_forcing.prompts import SwitchPolicy
from causal_forcing.training import evaluation, metrics, world
from causal_forcing.training.export import export
from causal_forcing.training.model import GENERATORS, embedded_preset

FORMAT = 1
"""Version of the report's layout."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    parser.add_argument("--preset", default="tiny", help="model of this world (default: %(default)s)")
    parser.add_argument("--weights-dir", type=Path, help="folder of weights (default: the embedded ones)")
    parser.add_argument("--training", type=Path, metavar="DIR", help="evaluate the checkpoints of a training folder")
    parser.add_argument("--stage", choices=GENERATORS, help="which generator of --training")
    parser.add_argument("--vae", default="wan", help="decoder (default: %(default)s)")
    parser.add_argument("--steps", help="denoising steps, e.g. 1000,500 (default: the preset's)")
    parser.add_argument(
        "--euler", action="store_true", help="follow the ODE by Euler's method, as a teacher (ar) needs"
    )
    parser.add_argument("--first-steps", help="steps of the first chunk (default: the same)")
    parser.add_argument("--window", type=int, help="attention window in latent frames (default: the preset's)")
    parser.add_argument("--sink", type=int, help="latent frames that are never evicted (default: the preset's)")
    parser.add_argument("--sink-rope", choices=[*SinkRope], help="where the sink's keys are (default: the preset's)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="questions, one JSON object a line")
    parser.add_argument("--count", type=int, default=500, help="held-out questions; 0 for none (default: %(default)s)")
    parser.add_argument("--offset", type=int, default=0, help="questions and trials to skip first, for work in parts")
    parser.add_argument("--switches", type=int, default=0, help="trials of a prompt switch, for each policy")
    parser.add_argument("--blends", type=int, default=0, help="trials of prompt blends and of slow transitions")
    parser.add_argument("--drift", type=int, default=0, metavar="LATENTS", help="length of long streams")
    parser.add_argument("--drift-count", type=int, default=48, help="long streams (default: %(default)s)")
    parser.add_argument("--validate", type=int, default=0, metavar="CLIPS", help="measure the reader itself, too")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"), help="report (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="contact sheet PNG of the first 16 clips")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the report and the contact sheet, print the accuracies; return 0."""
    engine = _load(args)
    if not engine.preset.trained:
        print(f"preset {engine.preset.name} has random weights: it has not been trained", file=sys.stderr)
    questions = _questions(args)
    evaluator = evaluation.Evaluator(engine, _overrides(args), args.seed, first=args.offset, euler=args.euler)
    report: dict[str, Any] = {"format": FORMAT, "preset": engine.preset.name, "trained": engine.preset.trained}
    report |= {"vae": args.vae, "settings": _settings(evaluator.config()) | {"euler": args.euler}}
    clips: list[evaluation.Frames] = []
    if args.count or args.prompts:
        report["follow"] = evaluator.follow(questions[: args.count] if args.prompts is None else questions, clips)
    if args.switches:
        report["switches"] = {policy.value: evaluator.switches(args.switches, policy) for policy in SwitchPolicy}
    if args.blends:
        report["blends"] = evaluator.blends(args.blends)
    if args.drift:
        report["drift"] = evaluator.drift(questions[: args.drift_count], args.drift)
    if args.validate:
        report["reader"] = _validate(engine, args.validate)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.sheet and clips:
        metrics.write_sheet(args.sheet, clips)
    if "follow" in report:
        _print_accuracies(report["follow"])
    print(f"report in {args.output}")
    return 0


def _print_accuracies(follow: dict[str, Any]) -> None:
    for name, value in follow["attributes"].items():
        print(f"{name:11s} {value['accuracy']:7.1%}  [{value['low']:.1%}, {value['high']:.1%}]  of {value['count']}")
    print(f"dynamic degree {follow['dynamic_degree']:.3f} pixels a frame")


def _load(args: argparse.Namespace) -> Engine:
    if args.training is None:
        if args.stage is not None:
            raise InvalidRequest("stage", args.stage, "needs --training")
        preset = get_preset(args.preset)
        if (preset.height, preset.width) != (world.SIDE, world.SIDE):
            raise InvalidRequest("preset", args.preset, "must be a model of the embedded world (tiny)")
        return Engine.load(preset, vae=args.vae, weights_dir=args.weights_dir)
    if args.weights_dir is not None:
        raise InvalidRequest("weights-dir", args.weights_dir, "must not be given with --training")
    folder = args.training / "export"
    export(args.training, folder, stage=args.stage or "cd")
    return Engine.load(embedded_preset(args.training), vae=args.vae, weights_dir=folder)


def _questions(args: argparse.Namespace) -> list[evaluation.Question]:
    if args.prompts is not None:
        return evaluation.read_questions(args.prompts)
    if args.count < 0:
        raise InvalidRequest("count", args.count, "must be at least 0")
    if args.offset < 0:
        raise InvalidRequest("offset", args.offset, "must be at least 0")
    needed = max(args.count, args.drift_count if args.drift else 0)
    return evaluation.held_out_questions(args.offset + needed)[args.offset :]


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {"window_frames": args.window, "sink_frames": args.sink, "sink_rope": args.sink_rope}
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, text in (("denoising_steps", args.steps), ("first_chunk_steps", args.first_steps)):
        if text is not None:
            try:
                overrides[name] = tuple(int(part) for part in text.split(","))
            except ValueError:
                raise InvalidRequest(name, text, "must be integers separated by commas") from None
    return overrides


def _settings(config: SessionConfig) -> dict[str, Any]:
    names = ("denoising_steps", "first_chunk_steps", "window_frames", "sink_frames", "sink_rope", "seed")
    return {name: getattr(config, name) for name in names}


def _validate(engine: Engine, clips: int) -> dict[str, Any]:
    rng = np.random.default_rng(10)
    drawn = [world.render(world.draw_clip(rng, world.draw_scene(rng), 45)) for _ in range(clips)]
    return {
        "drawn": evaluation.validate_reader(clips),
        "blurred": evaluation.validate_reader(clips, blur=1.0),
        "vae": evaluation.validate_vae(engine, clips),
        "dynamic_degree": float(np.mean([metrics.mean_flow(clip) for clip in drawn])),
        "flicker": float(np.mean([metrics.flicker(clip) for clip in drawn])),
    }
