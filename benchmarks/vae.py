"""How long the autoencoders take for one latent frame, beside a matrix multiplication and diffusers in the same rounds.

    python benchmarks/vae.py                                    the default cases, two threads
    python benchmarks/vae.py --cases wan:24:64x64,tae:16:64x64  type : width : pixels
    python benchmarks/vae.py --count-only                       only count arithmetic and state at 480x832
    python benchmarks/vae.py --cpu-time                         one thread, by its processor time, on a busy machine

Each round runs every contender once, so that what else the machine does falls on all of them; ratios are medians over
rounds. Types are `wan`, `wan1` (with one residual block a resolution instead of two) and `tae`; a width is the channels
at full resolution: 96 is the `wan` of the checkpoints, 24 their `lightvae`, 64 their `tae`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _report import write
from torch.utils.flop_counter import FlopCounterMode

from causal_forcing.config import TinyVaeConfig, VaeConfig
from causal_forcing.geometry import LATENT_CHANNELS, Geometry
from causal_forcing.vae import StreamingVae, TinyVae, WanVae

DEFAULT_CASES = (
    "wan1:16:64x64,wan:16:64x64,wan:20:64x64,wan:24:64x64,wan:32:64x64,tae:16:64x64,"
    "wan:16:128x128,wan:20:128x128,wan:24:128x128,wan:32:128x128,wan:96:160x256"
)
README_CASES = ("wan1:16:64x64", "wan:24:64x64", "tae:16:64x64", "wan:96:160x256")
MATRIX = 1536
RESIDUAL_BLOCKS = {"wan": 2, "wan1": 1}
REFERENCE_TERAFLOPS = {"wan:96": 13.550, "wan:24": 0.863, "tae:64": 0.544}
"""What the public code spends on a latent frame at 480x832."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        kind: ``wan``, ``wan1`` or ``tae``.
        width: Channels at full resolution.
        geometry: Frame size.
    """

    kind: str
    width: int
    geometry: Geometry

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read ``wan:24:64x64``."""
        kind, width, size = text.split(":")
        height, _, columns = size.partition("x")
        return cls(kind, int(width), Geometry(int(height), int(columns)))

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return f"{self.kind}:{self.width}:{self.geometry.height}x{self.geometry.width}"

    def build(self) -> StreamingVae:
        """Return a model with random weights on the current default device."""
        if self.kind in RESIDUAL_BLOCKS:
            config = VaeConfig(base_dim=self.width, num_res_blocks=RESIDUAL_BLOCKS[self.kind])
            return WanVae(config).requires_grad_(False)
        channels = (4 * self.width, 2 * self.width, self.width, self.width)
        return TinyVae(TinyVaeConfig(channels=channels)).requires_grad_(False)


def count_flops(case: Case) -> int:
    """Return the floating-point operations of a latent frame after the first, counted without computing anything."""
    with torch.device("meta"):
        vae, latents = case.build(), torch.empty(case.geometry.latent_shape(1))
        state = vae.new_decoder_state(case.geometry)
    vae.decode(latents, state)
    with FlopCounterMode(display=False) as counter:
        vae.decode(latents, state)
    return int(counter.get_total_flops())


def our_decoder(case: Case, latents: torch.Tensor) -> Callable[[], object]:
    """Return a call that decodes the next latent of a stream that has begun."""
    vae = case.build()
    state = vae.new_decoder_state(case.geometry)
    vae.decode(latents, state)
    return lambda: vae.decode(latents, state)


def diffusers_decoder(case: Case, latents: torch.Tensor) -> Callable[[], object]:
    """Return the same for diffusers' AutoencoderKLWan of the same sizes, with its own cache of features."""
    from diffusers import AutoencoderKLWan

    blocks = RESIDUAL_BLOCKS[case.kind]
    vae = AutoencoderKLWan(base_dim=case.width, num_res_blocks=blocks).requires_grad_(False)
    vae.clear_cache()

    def step(**options: bool) -> object:
        return vae.decoder(vae.post_quant_conv(latents), feat_cache=vae._feat_map, feat_idx=[0], **options)

    step(first_chunk=True)
    return step


def measure(case: Case, rounds: int, peer: bool, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the times of a latent frame and what they compare to."""
    matrix = torch.randn(MATRIX, MATRIX)
    latents = torch.randn(1, LATENT_CHANNELS, 1, case.geometry.latent_height, case.geometry.latent_width)
    contenders = {"ours": our_decoder(case, latents), "matmul": lambda: matrix @ matrix}
    if peer and case.kind in RESIDUAL_BLOCKS:
        contenders["diffusers"] = diffusers_decoder(case, latents)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            started = clock()
            call()
            times[name].append(1000 * (clock() - started))
    times = {name: values[1:] for name, values in times.items()}  # the first round warms up
    flops = count_flops(case)
    to_peak = [
        (flops / mine) / (2 * MATRIX**3 / other) for mine, other in zip(times["ours"], times["matmul"], strict=True)
    ]
    result: dict[str, Any] = {
        "case": case.name,
        "ms_per_latent": _spread(times["ours"]),
        "gigaflops_per_latent": round(flops / 1e9, 3),
        "matmul_peak_gflops_per_s": round(2 * MATRIX**3 / 1e6 / min(times["matmul"]), 1),
        "fraction_of_matmul": round(statistics.median(to_peak), 3),
    }
    if "diffusers" in times:
        ratios = [other / mine for mine, other in zip(times["ours"], times["diffusers"], strict=True)]
        result["diffusers_ms_per_latent"] = _spread(times["diffusers"])
        result["times_faster_than_diffusers"] = round(statistics.median(ratios), 2)
    return result


def full_size() -> list[dict[str, Any]]:
    """Return arithmetic and state of the real models at 480x832, from the meta device."""
    rows = []
    for name, reference in REFERENCE_TERAFLOPS.items():
        case = Case.parse(f"{name}:480x832")
        with torch.device("meta"):
            state = case.build().new_decoder_state(case.geometry, dtype=torch.bfloat16)
        teraflops = round(count_flops(case) / 1e12, 3)
        rows.append(
            {
                "case": case.name,
                "teraflops_per_latent": teraflops,
                "reference_teraflops_per_latent": reference,
                "decoder_state_bytes_bfloat16": state.nbytes,
            }
        )
    return rows


def readme_rows(results: list[dict[str, Any]], how: str) -> list[dict[str, str]]:
    """Return what the table says of the measured cases, each measured ``how``."""
    rows = []
    for result in results:
        if result["case"] not in README_CASES:
            continue
        value = f"{result['ms_per_latent']['median']} ms, {result['fraction_of_matmul']:.0%} of matmul speed"
        if "times_faster_than_diffusers" in result:
            value += f", {result['times_faster_than_diffusers']} times as fast as diffusers"
        rows.append({"measure": f"VAE decode of a latent frame, {result['case']}, {how}", "value": value})
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    low, high = min(values), max(values)
    return {"median": round(statistics.median(values), 2), "min": round(low, 2), "max": round(high, 2)}


def main() -> None:
    """Run the cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=DEFAULT_CASES, help="comma-separated TYPE:WIDTH:HEIGHTxWIDTH")
    parser.add_argument("--rounds", type=int, default=9, help="of every contender")
    parser.add_argument("--large-rounds", type=int, default=3, help="for cases over a TFLOP a latent")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread instead of elapsed time")
    parser.add_argument("--no-peer", action="store_true", help="without diffusers")
    parser.add_argument("--count-only", action="store_true", help="only count arithmetic and state at full size")
    parser.add_argument("--name", default="vae", help="of the result file")
    arguments = parser.parse_args()
    threads = 1 if arguments.cpu_time else arguments.threads
    torch.set_num_threads(threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    results = []
    for text in () if arguments.count_only else arguments.cases.split(","):
        case = Case.parse(text)
        rounds = arguments.large_rounds if count_flops(case) > 1e12 else arguments.rounds
        results.append(measure(case, rounds, not arguments.no_peer, clock))
    settings = {"threads": threads, "rounds": arguments.rounds, "clock": clock.__name__, "torch": torch.__version__}
    how = "processor time of one thread" if arguments.cpu_time else f"{threads} threads"
    rows = readme_rows(results, how)
    write(arguments.name, {"settings": settings, "cases": results, "full_size": full_size(), "readme": rows})


if __name__ == "__main__":
    main()
