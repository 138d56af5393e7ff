"""How long a new process takes until its compiled engine is ready, phase by phase, and how fast its chunks then are.

python benchmarks/gpu_cold_start.py --cache DIR     prints one line of JSON; run by gpu_check.py
"""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import argparse  # noqa: E402 (the clock starts before the imports)
import json  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from gpu_bench import Bench  # noqa: E402
from gpu_speed import BACKENDS  # noqa: E402
from torch.nn.attention import sdpa_kernel  # noqa: E402

from causal_forcing.compile import compile_transformer, use_compile_cache, warm_up  # noqa: E402
from causal_forcing.presets import get_preset  # noqa: E402


def main() -> None:
    """Load, compile, generate, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="causal-forcing-framewise")
    parser.add_argument("--size", default="480x832")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--attention", choices=list(BACKENDS), default="default")
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split("x"))
    use_compile_cache(arguments.cache)
    backend = BACKENDS[arguments.attention]
    phases = {"import_s": time.perf_counter() - _STARTED}
    bench = Bench(torch.device(arguments.device), get_preset(arguments.preset), height, width, Path())
    with nullcontext() if backend is None else sdpa_kernel(backend):
        since = time.perf_counter()
        engine = bench.engine
        bench.wait()
        phases["load_s"], since = time.perf_counter() - since, time.perf_counter()
        expected = bench.new_session().generate_chunk().latents
        bench.wait()
        phases["eager_chunk_s"], since = time.perf_counter() - since, time.perf_counter()
        compile_transformer(engine.transformer)
        warm_up(engine, bench.new_session().config)
        bench.wait()
        phases["compile_s"], since = time.perf_counter() - since, time.perf_counter()
        session = bench.new_session()
        ours = session.generate_chunk().latents
        bench.wait()
        phases["first_chunk_s"] = time.perf_counter() - since
        ready_s = time.perf_counter() - _STARTED - phases["eager_chunk_s"]
        error = float((ours.float() - expected.float()).norm() / expected.float().norm())
        with torch.compiler.set_stance("fail_on_recompile"):
            chunk_ms = bench.time_ms(bench.full_session().generate_chunk, repeats=12)
            queued = time.perf_counter()
            session.generate_chunk()
            queued_ms = 1000 * (time.perf_counter() - queued)
    counters = torch._dynamo.utils.counters
    print(
        json.dumps(
            {
                "ready_s": round(ready_s, 2),
                **{name: round(seconds, 2) for name, seconds in phases.items()},
                "attention": arguments.attention,
                "graphs": counters["stats"]["unique_graphs"],
                "cache_hits": counters["inductor"]["fxgraph_cache_hit"],
                "cache_misses": counters["inductor"]["fxgraph_cache_miss"],
                "relative_error_of_first_chunk": round(error, 5),
                "chunk_ms": chunk_ms,
                "queued_by_host_ms": round(queued_ms, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
