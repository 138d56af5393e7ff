"""The loop that every training stage runs: schedule, moving average, log, checkpoints that resume bit for bit.

A step's data and noise depend on the seed and the step's number alone (:func:`step_rng`), so a checkpoint needs no
generator state.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from causal_forcing.training.optimizer import Optimizer

DEFAULT_ROOT = Path("~/.cache/causal-forcing/training").expanduser()
"""Where stages keep their checkpoints and logs unless told otherwise."""


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run: linear warm-up, constant, linear decay to zero.

    Attributes:
        steps: Updates altogether.
        learning_rate: Its peak.
        warmup: Updates until the peak.
        decay_from: Fraction of the run at which the decay begins.
        save_every: Updates between checkpoints.
        ema: Decay of the moving average of the weights.
    """

    steps: int
    learning_rate: float
    warmup: int = 30
    decay_from: float = 0.5
    save_every: int = 100
    ema: float = 0.998

    def rate(self, step: int) -> float:
        """Return the learning rate of an update."""
        start = self.decay_from * self.steps
        decay = 1.0 if step < start else max(0.0, (self.steps - step) / max(1.0, self.steps - start))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * decay

    def average(self, step: int) -> float:
        """Return the decay of the moving average, smaller at the beginning."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(frozen=True)
class StepRandom:
    """Randomness of one step.

    Attributes:
        numpy: For scenes and captions.
        torch: For noise.
    """

    numpy: np.random.Generator
    torch: torch.Generator


def step_rng(seed: int, step: int) -> StepRandom:
    """Return generators that depend on the seed and the step alone."""
    sequence = np.random.SeedSequence((seed, step))
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
    return StepRandom(np.random.default_rng(sequence), generator)


Objective = Callable[[int, StepRandom], dict[str, Tensor]]
"""Returns named scalars for a step; the one named ``loss`` is minimised."""


class Run:
    """One training run in a folder: ``last.safetensors``, ``ema.safetensors`` and ``log.jsonl``.

    Args:
        folder: Created if missing; a checkpoint in it is resumed.
        parameters: Leaf tensors by name; loaded in place when resuming.
        schedule: Length and learning rate.
        seed: Source of all randomness.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Tensor], schedule: Schedule, seed: int) -> None:
        self.folder, self.schedule, self.seed = folder, schedule, seed
        self.parameters = {name: value.requires_grad_() for name, value in parameters.items()}
        self.optimizer = Optimizer(self.parameters)
        self.ema = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.step = 0
        self.stopped = False
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "last.safetensors").exists():
            self._load()

    def train(self, objective: Objective, *, until: int | None = None) -> None:
        """Run updates up to ``until`` (default: the schedule's end), logging and saving; stops cleanly on SIGTERM."""
        previous = signal.signal(signal.SIGTERM, self._stop)
        end = self.schedule.steps if until is None else min(until, self.schedule.steps)
        try:
            while self.step < end and not self.stopped:
                self._update(objective)
                if self.step % self.schedule.save_every == 0 or self.step == end or self.stopped:
                    self.save()
        finally:
            signal.signal(signal.SIGTERM, previous)

    @property
    def exit_status(self) -> int:
        """What the stage's process returns: 0, or 143 if it was told to stop, so that no later stage begins."""
        return 128 + signal.SIGTERM if self.stopped else 0

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.stopped = True

    def _update(self, objective: Objective) -> None:
        started = time.process_time()
        values = objective(self.step, step_rng(self.seed, self.step))
        values["loss"].backward()  # type: ignore[no-untyped-call]
        norm = self.optimizer.step(self.step, self.schedule.rate(self.step))
        decay = self.schedule.average(self.step)
        with torch.no_grad():
            for name, value in self.parameters.items():
                self.ema[name].lerp_(value, 1 - decay)
        record = {"step": self.step} | {name: round(value.item(), 6) for name, value in values.items()}
        record |= {"grad_norm": round(norm, 5), "cpu_s": round(time.process_time() - started, 3)}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint and the averaged weights, each atomically."""
        tensors = {f"value/{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.items()}
        tensors |= {f"state/{name}": value for name, value in self.optimizer.state.items()}
        _write(self.folder / "last.safetensors", tensors, {"step": str(self.step), "seed": str(self.seed)})
        _write(self.folder / "ema.safetensors", self.ema, {"step": str(self.step)})

    @torch.no_grad()
    def _load(self) -> None:
        path = self.folder / "last.safetensors"
        tensors = load_file(path)
        targets = {f"value/{name}": value for name, value in self.parameters.items()}
        targets |= {f"ema/{name}": value for name, value in self.ema.items()}
        targets |= {f"state/{name}": value for name, value in self.optimizer.state.items()}
        if set(targets) != set(tensors):
            raise ValueError(f"{path} does not belong to this model: {sorted(set(targets) ^ set(tensors))[:4]}")
        for name, value in targets.items():
            value.copy_(tensors[name])
        self.step = int(read_metadata(path)["step"])
        kept = [record for record in read_log(self.folder) if record["step"] < self.step]
        (self.folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in kept))


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__", {}))


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return a run's log, one record an update; a last line that was cut off is left out."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata)
    part.replace(path)


def background_process(root: Path) -> None:
    """Lower this process's priority, use one thread, and record its process group in ``root/process_group``.

    Benchmarks read that file to pause training (SIGSTOP) while they measure.
    """
    os.nice(19 - os.nice(0))
    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    (root / "process_group").write_text(f"{os.getpgrp()}\n")
