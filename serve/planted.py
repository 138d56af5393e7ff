"""Faults that a test plants in a simulated engine, in whatever process it runs: a file's name says what shall happen.

`simulated.fault_dir` names the folder; users cannot reach it, and an engine that computes never looks. At its next
chunk, a generator that finds a file there takes it away and does what its name says; a file whose name ends with
``-always`` stays, and strikes every chunk of every generator. Names that begin with ``decoder-`` or ``text-`` are meant
for the next decode call or batch of prompts.

| file | what happens |
|---|---|
| ``nan`` | the chunk is not finite |
| ``oom`` | the device is out of memory |
| ``cuda`` | the device reports an error |
| ``error`` | an exception that nobody expected |
| ``hang`` | the step does not end as long as the folder is there |
| ``exit`` | the process ends at once |
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from causal_forcing.errors import DeviceFault, NonFiniteOutput, OutOfMemory

ALWAYS = "-always"
"""Ends the name of a fault that is not over after one time."""


def _nan(_: Path) -> None:
    raise NonFiniteOutput("the chunk holds NaN or infinity (planted)")


def _oom(_: Path) -> None:
    raise OutOfMemory("the device ran out of memory (planted)")


def _cuda(_: Path) -> None:
    raise DeviceFault("the device failed (planted)")


def _error(_: Path) -> None:
    raise RuntimeError("nobody expected this (planted)")


def _hang(folder: Path) -> None:
    while folder.exists():
        time.sleep(0.05)


def _exit(_: Path) -> None:
    os._exit(1)


FAULTS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {"nan": _nan, "oom": _oom, "cuda": _cuda, "error": _error, "hang": _hang, "exit": _exit}
)
"""What happens, by the file's name."""


def strike(folder: Path | None, part: str = "") -> None:
    """Do what a planted file says, if there is one whose name begins with ``part``."""
    if folder is None:
        return
    for name, happen in FAULTS.items():
        if (folder / f"{part}{name}{ALWAYS}").exists():
            happen(folder)
        try:
            (folder / f"{part}{name}").unlink()
        except FileNotFoundError:
            continue
        happen(folder)
