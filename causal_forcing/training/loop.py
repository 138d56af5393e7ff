"""The loop that every training stage runs: schedule, moving average, log, checkpoints that resume bit for bit.

A step's data and noise depend on the seed, the step's number and the kind of device alone (:func:`step_rng`), so a
checkpoint needs no generator state. A run ends after its steps, or after its *budget*, a wall time: then the learning
rate falls with whichever of the two is further on, so that a run on a fast device and one on a slow device both end at
zero. Runs with a budget depend on the clock; without one they repeat bit for bit on one machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

LOG_EVERY = 20
"""Updates between two writings of the log on a GPU, which has to be waited for; on a CPU every update is written."""

POLL_S = 0.2


@dataclass(frozen=True)
class Device:
    """Where and how a stage computes.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        bfloat16: Whether matrix products and convolutions run in bfloat16 (weights and sums stay float32).
        compiled: Whether the generator's blocks are compiled, if they can be.
    """

    kind: str = "cpu"
    bfloat16: bool = False
    compiled: bool = False

    @property
    def torch(self) -> torch.device:
        """The device itself."""
        return torch.device(self.kind)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for forward passes."""
        return torch.autocast(self.kind, torch.bfloat16) if self.bfloat16 else nullcontext()


CPU = Device()


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
        budget_s: Wall seconds after which the run ends even if steps are left; None for no limit.
    """

    steps: int
    learning_rate: float
    warmup: int = 30
    decay_from: float = 0.5
    save_every: int = 100
    ema: float = 0.998
    budget_s: float | None = None

    def progress(self, step: int, elapsed_s: float) -> float:
        """Return how much of the run is done, 0 to 1 and more."""
        spent = 0.0 if self.budget_s is None else elapsed_s / self.budget_s
        return max(step / self.steps, spent)

    def rate(self, step: int, elapsed_s: float = 0.0) -> float:
        """Return the learning rate of an update."""
        left = 1 - self.progress(step, elapsed_s)
        decay = min(1.0, max(0.0, left / (1 - self.decay_from)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * decay

    def average(self, step: int) -> float:
        """Return the decay of the moving average, smaller at the beginning."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(frozen=True)
class StepRandom:
    """Randomness of one step.

    Attributes:
        numpy: For scenes and captions.
        torch: For noise, on the device that computes.
    """

    numpy: np.random.Generator
    torch: torch.Generator


def step_rng(seed: int, step: int, device: torch.device | str = "cpu") -> StepRandom:
    """Return generators that depend on the seed and the step alone (and the device on its kind)."""
    sequence = np.random.SeedSequence((seed, step))
    generator = torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
    return StepRandom(np.random.default_rng(sequence), generator)


Objective = Callable[[int, StepRandom], dict[str, Tensor]]
"""Returns named scalars for a step; the one named ``loss`` is minimised."""


class Run:
    """One training run in a folder: ``last.safetensors``, ``ema.safetensors`` and ``log.jsonl``.

    Args:
        folder: Created if missing; a checkpoint in it is resumed.
        parameters: Leaf tensors by name, all on one device; loaded in place when resuming.
        schedule: Length and learning rate.
        seed: Source of all randomness.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Tensor], schedule: Schedule, seed: int) -> None:
        self.folder, self.schedule, self.seed = folder, schedule, seed
        self.parameters = {name: value.requires_grad_() for name, value in parameters.items()}
        self.device = next(iter(parameters.values())).device
        self.optimizer = Optimizer(self.parameters)
        self.ema = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.step, self.elapsed_s = 0, 0.0
        self.stopped = False
        self._unwritten: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "last.safetensors").exists():
            self._load()

    @property
    def progress(self) -> float:
        """How much of the schedule is done, from 0 to 1."""
        return self.schedule.progress(self.step, self.elapsed_s)

    @property
    def finished(self) -> bool:
        """Whether the schedule's steps or budget are used up."""
        return self.progress >= 1

    def train(self, objective: Objective, *, until: int | None = None) -> None:
        """Run updates up to ``until`` (default: the schedule's end), logging and saving; stops cleanly on SIGTERM."""
        previous = signal.signal(signal.SIGTERM, self._stop)
        try:
            before = time.monotonic() - self.elapsed_s
            while not (self.finished or self.stopped or self.step == until):
                self._update(objective)
                self.elapsed_s = time.monotonic() - before
                if self.step % self.schedule.save_every == 0:
                    self.save()
            self.save()
            if self.finished:
                mark_finished(self.folder, steps=self.step, seconds=round(self.elapsed_s, 1))
        finally:
            signal.signal(signal.SIGTERM, previous)

    @property
    def exit_status(self) -> int:
        """What the stage's process returns: 0, or 143 if it was told to stop, so that no later stage begins."""
        return 128 + signal.SIGTERM if self.stopped else 0

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.stopped = True

    def _update(self, objective: Objective) -> None:
        values = objective(self.step, step_rng(self.seed, self.step, self.device))
        values["loss"].backward()  # type: ignore[no-untyped-call]
        rate = self.schedule.rate(self.step, self.elapsed_s)
        values["grad_norm"] = self.optimizer.step(self.step, rate)
        with torch.no_grad():
            names = list(self.parameters)
            averages, current = [self.ema[n] for n in names], [self.parameters[n] for n in names]
            torch._foreach_lerp_(averages, current, 1 - self.schedule.average(self.step))
        record = {"step": self.step, "rate": round(rate, 8), "at_s": round(self.elapsed_s, 2)}
        self._unwritten.append((record, {name: value.detach() for name, value in values.items()}))
        self.step += 1
        if self.device.type == "cpu" or len(self._unwritten) >= LOG_EVERY:
            self._write_log()

    def _write_log(self) -> None:
        """Write the records that are waiting.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        records = [
            record | {name: round(value.item(), 6) for name, value in values.items()}
            for record, values in self._unwritten
        ]
        self._unwritten.clear()
        with (self.folder / "log.jsonl").open("a") as log:
            log.writelines(json.dumps(record) + "\n" for record in records)
        for record in records:
            if not np.isfinite(record["loss"]):
                raise FloatingPointError(f"{self.folder.name}: the loss of step {record['step']} is {record['loss']}")

    def save(self) -> None:
        """Write the checkpoint and the averaged weights, each atomically."""
        self._write_log()
        tensors = {f"value/{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.items()}
        tensors |= {f"state/{name}": value for name, value in self.optimizer.state.items()}
        metadata = {"step": str(self.step), "seed": str(self.seed), "elapsed_s": f"{self.elapsed_s:.3f}"}
        write_tensors(self.folder / "last.safetensors", tensors, metadata)
        write_tensors(self.folder / "ema.safetensors", self.ema, {"step": str(self.step)})

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
        metadata = read_metadata(path)
        self.step, self.elapsed_s = int(metadata["step"]), float(metadata["elapsed_s"])
        kept = [record for record in read_log(self.folder) if record["step"] < self.step]
        (self.folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in kept))


def mark_finished(folder: Path, **facts: float) -> None:
    """Say that what ``folder`` holds is complete, for :func:`wait_for`."""
    part = folder / "finished.part"
    part.write_text(json.dumps(facts) + "\n")
    part.replace(folder / "finished.json")


def wait_for(folder: Path, name: str = "finished.json") -> None:
    """Return when the stage that writes ``folder`` has finished (or written ``name``); for stages started together."""
    while not (folder / name).exists():
        time.sleep(POLL_S)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the enclosed work after some seconds; main thread only.

    Raises:
        TimeoutError: If it took longer.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__", {}))


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return a run's log, one record an update; a last line that was cut off is left out."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata)
    part.replace(path)


def add_arguments(parser: argparse.ArgumentParser, *, compiles: bool = False) -> None:
    """Add the options that every stage has, and that of a stage which ``compiles`` the generator."""
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--wait", action="store_true", help="prepare, then wait for the stage before")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="wall time after which the stage ends")
    parser.add_argument("--steps", type=int, help="updates altogether, instead of the stage's own number")
    parser.add_argument("--rate", type=float, help="highest learning rate, instead of the stage's own")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16, which a GPU always does")
    if compiles:
        parser.add_argument("--compile", action="store_true", help="compile the generator, which a GPU always does")
    else:
        parser.set_defaults(compile=False)


def chosen_schedule(arguments: argparse.Namespace, cpu: Schedule, gpu: Schedule) -> Schedule:
    """Return the schedule of a device, with the steps, the budget and the rate that were asked for."""
    schedule = cpu if arguments.device == "cpu" else gpu
    given = {"steps": arguments.steps, "budget_s": arguments.budget, "learning_rate": arguments.rate}
    return dataclasses.replace(schedule, **{name: value for name, value in given.items() if value is not None})


def start_process(arguments: argparse.Namespace) -> Device:
    """Set up this process for training and return what it computes on.

    On the CPU: few threads at niceness 19, its process group recorded in ``root/process_group``, which benchmarks read
    to pause training (SIGSTOP) while they measure. On a GPU: bfloat16 products, and TF32 where float32 is asked for.

    Raises:
        SystemExit: If there is no such device.
    """
    root: Path = arguments.root
    root.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: this machine has no CUDA device that PyTorch can use")
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        return Device("cuda", bfloat16=True, compiled=True)
    os.nice(19 - os.nice(0))
    (root / "process_group").write_text(f"{os.getpgrp()}\n")
    return Device(bfloat16=arguments.bfloat16, compiled=arguments.compile)
