"""How long a forward pass of the transformer takes with a full window, beside a matrix multiplication.

    python benchmarks/dit.py                     every case, eager and compiled, two threads
    python benchmarks/dit.py --cases small_16    some of them
    python benchmarks/dit.py --reference DIR     beside the reference's code, from a checkout (see peer.py)
    python benchmarks/dit.py --cpu-time          one thread, by its processor time, on a busy machine

Cases: ``small_16`` and ``small_64`` are 8 blocks of width 256 with 16 and 64 tokens a frame and 21 frames of context;
``wan_30x52`` and ``wan_60x104`` are two blocks of the 1.3B model with 21 and 6 frames of context at those latent sizes.
Each round runs every contender once (small ones as many passes as a chunk has, and counts their mean), so that what
else the machine does falls on all of them; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _report import paused_training, spread, write
from peer import load_reference, reference_call
from torch import Tensor

from causal_forcing.compile import compile_transformer
from causal_forcing.config import SessionConfig, TransformerConfig
from causal_forcing.engine import choose_layout
from causal_forcing.kv_cache import KeyValueCache
from causal_forcing.presets import WAN_1_3B
from causal_forcing.rope import RotaryEmbedding
from causal_forcing.session import cache_layout
from causal_forcing.transformer import CausalTransformer, ChunkContext
from causal_forcing.weights.initialise import seeded_weights

MATRIX = 1536
PASSES = 5
"""Of a chunk: four steps and the context pass."""

TIMESTEP = 937.5
SMALL = TransformerConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=128, text_len=64)
WAN_TWO_BLOCKS = dataclasses.replace(WAN_1_3B, num_layers=2)


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        config: Sizes of the transformer.
        height: Pixel rows.
        width: Pixel columns.
        window: Latent frames that are attended to, the new one included.
    """

    config: TransformerConfig
    height: int
    width: int
    window: int

    @property
    def session(self) -> SessionConfig:
        """The session this is."""
        return SessionConfig(height=self.height, width=self.width, window_frames=self.window)

    @property
    def is_small(self) -> bool:
        """Whether a pass takes milliseconds."""
        return self.config is SMALL

    @property
    def flops(self) -> int:
        """Operations of a forward pass: linears, attention to the window and to the prompt, patches and head.

        Source: the transformer's matrix shapes, two operations a multiply-add.
        """
        c, tokens = self.config, self.session.geometry.tokens_per_frame
        linear = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
        attention = 4 * tokens * c.dim * (tokens * self.window + c.text_len)
        return c.num_layers * (linear + attention) + 2 * 2 * tokens * 64 * c.dim


CASES = {
    "small_16": Case(SMALL, 64, 64, 21),
    "small_64": Case(SMALL, 128, 128, 21),
    "wan_30x52": Case(WAN_TWO_BLOCKS, 240, 416, 21),
    "wan_60x104": Case(WAN_TWO_BLOCKS, 480, 832, 6),
}


@dataclass(frozen=True)
class Inputs:
    """What every contender of a case reads."""

    weights: dict[str, Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    text: Tensor
    latents: Tensor

    @classmethod
    def draw(cls, case: Case) -> Inputs:
        """Return random inputs of a case."""
        config, geometry = case.config, case.session.geometry
        with torch.device("meta"):
            transformer = CausalTransformer(config)
        rows = (1, config.num_heads, case.window * geometry.tokens_per_frame, config.head_dim)
        keys, values = ([torch.randn(rows) for _ in range(config.num_layers)] for _ in range(2))
        text = torch.randn(1, config.text_len, config.text_dim)
        return cls(seeded_weights(transformer, 0), keys, values, text, torch.randn(geometry.latent_shape(1)))


def our_call(case: Case, inputs: Inputs, *, compiled: bool) -> Callable[[], Tensor]:
    """Return a call that runs one forward pass of the newest frame of a full window."""
    config, session, device = case.config, case.session, torch.device("cpu")
    with torch.device("meta"):
        transformer = CausalTransformer(config)
    transformer.load_state_dict({name: t.clone() for name, t in inputs.weights.items()}, assign=True)
    transformer.requires_grad_(False).eval()
    choose_layout(transformer, session.geometry.tokens_per_frame)
    if compiled:
        compile_transformer(transformer)
    with torch.inference_mode():
        cache = KeyValueCache(config, cache_layout(session), device=device, dtype=torch.float32)
        for held, given in zip((*cache.keys, *cache.values), (*inputs.keys, *inputs.values), strict=True):
            held.copy_(given)
        cache.skip(case.window - 1)
        plan = cache.plan(1)
        rotation = RotaryEmbedding(config, session.geometry, device).rotation([plan.start])
        context = ChunkContext(cache, plan, rotation, transformer.read_text(inputs.text))
        modulation = transformer.modulate(TIMESTEP)

    def call() -> Tensor:
        with torch.inference_mode():
            velocity: Tensor = transformer(inputs.latents, modulation, context)
            return velocity

    return call


def contenders(case: Case, reference: Path | None) -> dict[str, Callable[[], Tensor]]:
    """Return everything that is timed; all but the matrix multiplication compute the same."""
    inputs, matrix = Inputs.draw(case), torch.randn(MATRIX, MATRIX)
    calls = {name: our_call(case, inputs, compiled=name == "compiled") for name in ("eager", "compiled")}
    if reference is not None:
        model = load_reference(reference, case.config, inputs.weights)
        calls["reference"] = reference_call(
            model, inputs.latents, TIMESTEP, text=inputs.text, keys=inputs.keys, values=inputs.values
        )
    expected = calls["eager"]()
    for name, call in calls.items():
        torch.testing.assert_close(call(), expected, atol=1e-4, rtol=0, msg=f"{name} computes something else")
    return {**calls, "matmul": lambda: matrix @ matrix}


def measure(case: Case, rounds: int, clock: Callable[[], float], reference: Path | None) -> dict[str, Any]:
    """Return the times of a forward pass and how they compare."""
    calls = contenders(case, reference)
    repeats = PASSES if case.is_small else 1
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            count = 1 if name == "matmul" else repeats
            started = clock()
            for _ in range(count):
                call()
            times[name].append(1000 * (clock() - started) / count)
    peak = 2 * MATRIX**3
    result: dict[str, Any] = {
        "gigaflops": round(case.flops / 1e9, 4),
        "matmul_peak_gflops_per_s": round(peak / 1e6 / min(times["matmul"]), 1),
    }
    for name in calls.keys() - {"matmul"}:
        shares = [
            (case.flops / mine) / (peak / other) for mine, other in zip(times[name], times["matmul"], strict=True)
        ]
        result[name] = {"ms": spread(times[name]), "fraction_of_matmul": round(statistics.median(shares), 3)}
        if reference is not None:
            ratios = [other / mine for mine, other in zip(times[name], times["reference"], strict=True)]
            result[name]["times_faster_than_reference"] = round(statistics.median(ratios), 2)
    return result


def readme_rows(results: dict[str, dict[str, Any]], *, cpu_time: bool) -> list[dict[str, Any]]:
    """Return what the table says."""
    clock = ", processor time of one thread" if cpu_time else ""
    return [
        {
            "measure": f"transformer forward, {name}, {how}{clock}",
            "value": f"{result[how]['ms']['median']} ms, {result[how]['fraction_of_matmul']:.0%} of matmul speed"
            + (
                f", {result[how]['times_faster_than_reference']} times as fast as the reference"
                if "reference" in result
                else ""
            ),
            "headline": (name, how) == ("wan_60x104", "compiled") and not cpu_time,
        }
        for name, result in results.items()
        for how in ("eager", "compiled")
    ]


def main() -> None:
    """Run the cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated names")
    parser.add_argument("--rounds", type=int, default=40, help="of every contender of a small case")
    parser.add_argument("--large-rounds", type=int, default=3, help="of every contender of a case at 1.3B width")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", type=Path, help="checkout of github.com/thu-ml/Causal-Forcing")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, timed by its processor time")
    parser.add_argument("--name", default="dit", help="of the result file")
    arguments = parser.parse_args()
    threads = 1 if arguments.cpu_time else arguments.threads
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results = {}
    with paused_training() as paused:
        for name in arguments.cases.split(","):
            rounds = arguments.rounds if CASES[name].is_small else arguments.large_rounds
            results[name] = measure(CASES[name], rounds, clock, arguments.reference)
    settings = {
        "threads": threads,
        "clock": "processor time" if arguments.cpu_time else "wall",
        "torch": torch.__version__,
        "training_paused": paused,
    }
    write(
        arguments.name,
        {"settings": settings, "cases": results, "readme": readme_rows(results, cpu_time=arguments.cpu_time)},
    )


if __name__ == "__main__":
    main()
