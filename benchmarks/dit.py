"""How long a forward pass of the transformer takes with a full window, beside a matrix multiplication.

    python benchmarks/dit.py                     every case, eager and compiled, two threads
    python benchmarks/dit.py --cases small_16    some of them

Cases: ``small_16`` and ``small_64`` are 8 blocks of width 256 with 16 and 64 tokens a frame and 21 frames of context;
``wan_30x52`` and ``wan_60x104`` are two blocks of the 1.3B model with 21 and 6 frames of context at those latent sizes.
Each round runs every contender once, so that what else the machine does falls on all of them; ratios are medians over
rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _report import paused_training, spread, write

from causal_forcing.compile import compile_transformer
from causal_forcing.config import SessionConfig, TransformerConfig
from causal_forcing.engine import FEW_TOKENS
from causal_forcing.kv_cache import KeyValueCache
from causal_forcing.presets import WAN_1_3B
from causal_forcing.rope import RotaryEmbedding
from causal_forcing.session import cache_layout
from causal_forcing.transformer import CausalTransformer, ChunkContext
from causal_forcing.weights.initialise import seeded_weights

MATRIX = 1536
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


def forward_call(case: Case, *, compiled: bool) -> Callable[[], object]:
    """Return a call that runs one forward pass of the next frame, the window being full."""
    config, session = case.config, case.session
    device = torch.device("cpu")
    with torch.device("meta"):
        transformer = CausalTransformer(config)
    transformer.load_state_dict(seeded_weights(transformer, 0), assign=True)
    transformer.requires_grad_(False).eval()
    if case.session.geometry.tokens_per_frame <= FEW_TOKENS:
        transformer.pack_for_few_tokens()
    if compiled:
        compile_transformer(transformer)
    with torch.inference_mode():
        cache = KeyValueCache(config, cache_layout(session), device=device, dtype=torch.float32)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()
        cache.skip(case.window)
        plan = cache.plan(1)
        rotation = RotaryEmbedding(config, session.geometry, device).rotation([plan.start])
        text = transformer.read_text(torch.randn(1, config.text_len, config.text_dim))
        context = ChunkContext(cache, plan, rotation, text)
        modulation, latents = transformer.modulate(937.5), torch.randn(session.geometry.latent_shape(1))

    def call() -> object:
        with torch.inference_mode():
            return transformer(latents, modulation, context)

    return call


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return the times of a forward pass, eager and compiled, and their shares of matrix multiplication speed."""
    matrix = torch.randn(MATRIX, MATRIX)
    contenders = {
        "eager": forward_call(case, compiled=False),
        "compiled": forward_call(case, compiled=True),
        "matmul": lambda: matrix @ matrix,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 2):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    times = {name: values[2:] for name, values in times.items()}  # compilation and warm-up
    result: dict[str, Any] = {
        "gigaflops": round(case.flops / 1e9, 4),
        "matmul_peak_gflops_per_s": round(2 * MATRIX**3 / 1e6 / min(times["matmul"]), 1),
    }
    for name in ("eager", "compiled"):
        shares = [
            (case.flops / mine) / (2 * MATRIX**3 / other)
            for mine, other in zip(times[name], times["matmul"], strict=True)
        ]
        result[name] = {"ms": spread(times[name]), "fraction_of_matmul": round(statistics.median(shares), 3)}
    return result


def readme_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return what the README's table says."""
    return [
        {
            "measure": f"transformer forward, {name}, {how}",
            "value": f"{result[how]['ms']['median']} ms, {result[how]['fraction_of_matmul']:.0%} of matmul speed",
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with paused_training() as paused:
        results = {
            name: measure(CASES[name], arguments.rounds if name.startswith("small") else arguments.large_rounds)
            for name in arguments.cases.split(",")
        }
    settings = {"threads": arguments.threads, "torch": torch.__version__, "training_paused": paused}
    write("dit", {"settings": settings, "cases": results, "readme": readme_rows(results)})


if __name__ == "__main__":
    main()
