"""The real sizes on this machine: every part loads from a file of true size and layout, and a chunk is generated.

    python benchmarks/full_size.py [--dir DIR]

Random weights of Wan2.1-T2V-1.3B's generator (float32, Causal-Forcing's `.pt` with FSDP prefixes), UMT5-XXL (bfloat16,
the original names) and the Wan VAE (float32 `.pth`) are written to a temporary folder and loaded by preset name through
the production loaders, one part at a time in a process of its own: a prompt is encoded, frame-wise chunks of four steps
at 128x128 are generated from it, and latents are decoded. Needs 12 GB of disk, 12 GB of memory and some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _report import write
from torch import Tensor

from causal_forcing.engine import Engine
from causal_forcing.presets import get_preset
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.text_encoder import build_encoder
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import WanVae
from causal_forcing.weights import load_text_encoder, load_transformer, load_vae
from causal_forcing.weights.formats import TensorInfo
from causal_forcing.weights.initialise import draw_weight, seeded_weights
from causal_forcing.weights.inspection import inspect_file
from causal_forcing.weights.keys import EMBEDDING_ALIAS, TEXT_ENCODER_ORIGINAL
from causal_forcing.weights.locate import download_path
from causal_forcing.weights.writing import write_safetensors

PRESET = get_preset("causal-forcing-framewise")
SIZE = 128
PROMPT = "a red fox runs through deep snow, cinematic"
UPDATE = PromptUpdate((WeightedPrompt(PROMPT),))


class Peak:
    """Highest resident memory of this process while it is open, sampled every 20 ms; file pages are reclaimable."""

    def __init__(self) -> None:
        self.anonymous_bytes = self.file_bytes = self.total_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            anonymous, mapped = (1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssFile"))
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous)
            self.file_bytes = max(self.file_bytes, mapped)
            self.total_bytes = max(self.total_bytes, anonymous + mapped)


@contextmanager
def timed(result: dict[str, Any], name: str) -> Iterator[None]:
    """Store the seconds that a block takes."""
    start = time.perf_counter()
    yield
    result[name] = round(time.perf_counter() - start, 2)


def write_transformer(folder: Path) -> Path:
    """Write the generator as Causal-Forcing's frame-wise files are laid out."""
    file = PRESET.files.transformer
    assert file is not None
    path = download_path(file, folder)
    path.parent.mkdir(parents=True)
    with torch.device("meta"):
        module = CausalTransformer(PRESET.transformer)
    weights = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in seeded_weights(module, 0).items()}
    torch.save({"generator_ema": weights}, path)
    return path


def write_vae(folder: Path) -> Path:
    """Write the VAE as Wan2.1_VAE.pth is laid out."""
    path = download_path(PRESET.files.vaes["wan"], folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        module = WanVae(PRESET.vaes["wan"])  # type: ignore[arg-type]
    torch.save({name: tensor.contiguous() for name, tensor in seeded_weights(module, 1).items()}, path)
    return path


def write_text_encoder(folder: Path) -> Path:
    """Write the text encoder under its original names, tensor by tensor, and a tokenizer with the right ids."""
    file, tokenizer = PRESET.files.text_encoder, PRESET.files.tokenizer
    assert file is not None
    assert tokenizer is not None
    path = download_path(file, folder).with_suffix(".safetensors")
    state = build_encoder(PRESET.text_encoder, "meta").state_dict()
    ours = {TEXT_ENCODER_ORIGINAL.to_file(name) or "": name for name in state if name != EMBEDDING_ALIAS}
    infos = {theirs: TensorInfo(tuple(state[name].shape), torch.bfloat16) for theirs, name in ours.items()}

    def produce(theirs: str) -> Tensor:
        return draw_weight(ours[theirs], state[ours[theirs]], 2).bfloat16()

    write_safetensors(path, infos, produce)
    write_tokenizer(download_path(tokenizer, folder))
    return path


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer.json that gives every word an id of its own; the real one is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: 1000 + i for i, word in enumerate(PROMPT.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def run_text_encoder(folder: Path, result: dict[str, Any]) -> None:
    """Encode the prompt; weights stay memory-mapped, and are paged in layer by layer as they are used."""
    with timed(result, "load_s"):
        encoder = load_text_encoder(PRESET, folder, dtype=torch.bfloat16)
    with timed(result, "encode_s"):
        (embedding,) = encoder.encode([PROMPT])
    with timed(result, "encode_again_from_cache_s"):
        encoder.encode([PROMPT])
    assert embedding.embeds.isfinite().all()
    result["embedding"] = {
        "shape": list(embedding.embeds.shape),
        "std": round(embedding.embeds.float().std().item(), 4),
    }
    torch.save(embedding.embeds, folder / "embeds.pt")


def run_transformer(folder: Path, result: dict[str, Any]) -> None:
    """Generate one frame-wise chunk of four steps from the encoded prompt."""
    with timed(result, "load_s"):
        transformer = load_transformer(PRESET, folder, dtype=torch.float32)
    engine = Engine(PRESET, transformer)
    session = engine.new_session(engine.session_config(height=SIZE, width=SIZE))
    embeds = torch.load(folder / "embeds.pt", weights_only=True).float()
    session.update_prompt(UPDATE, [PromptEmbedding(embeds, "full-size")])
    with timed(result, "first_chunk_s"):
        session.generate_chunk()
    with timed(result, "second_chunk_s"):
        chunk = session.generate_chunk()
    assert chunk.latents.isfinite().all()
    result["latents"] = {"shape": list(chunk.latents.shape), "std": round(chunk.latents.std().item(), 4)}
    result["session_bytes"] = session.state.nbytes
    torch.save(chunk.latents, folder / "latents.pt")


def run_vae(folder: Path, result: dict[str, Any]) -> None:
    """Decode the chunk's latents, twice, so that both the first frame and a group of four are made."""
    with timed(result, "load_s"):
        vae = load_vae(PRESET, "wan", folder)
    geometry = PRESET.session_config(height=SIZE, width=SIZE).geometry
    state = vae.new_decoder_state(geometry)
    latents = torch.load(folder / "latents.pt", weights_only=True)
    with torch.inference_mode():
        with timed(result, "decode_first_s"):
            vae.decode(latents, state)
        with timed(result, "decode_next_s"):
            pixels = vae.decode(latents, state)
    assert pixels.isfinite().all()
    result["pixels"] = {"shape": list(pixels.shape), "std": round(pixels.std().item(), 4)}


PARTS: dict[str, tuple[Callable[[Path], Path], Callable[[Path, dict[str, Any]], None]]] = {
    "text_encoder": (write_text_encoder, run_text_encoder),
    "transformer": (write_transformer, run_transformer),
    "vae": (write_vae, run_vae),
}


def run_stage(stage: str, part: str, folder: Path) -> dict[str, Any]:
    """Write or run one part, in this process."""
    result: dict[str, Any] = {}
    write_part, run_part = PARTS[part]
    with Peak() as peak:
        if stage == "write":
            with timed(result, "write_s"):
                path = write_part(folder)
            found = inspect_file(path)
            assert not found.problems, found.problems
            result |= {"file_bytes": path.stat().st_size, "parameters": found.parameter_count, "format": found.format}
        else:
            run_part(folder, result)
    names = ("anonymous_bytes", "file_bytes", "total_bytes")
    return result | {f"{stage}_peak": {name: getattr(peak, name) for name in names}}


def run_part_in_processes(part: str, folder: Path) -> dict[str, Any]:
    """Write a part and run it, each in a process of its own, and delete its file."""
    merged: dict[str, Any] = {}
    for stage in ("write", "run"):
        command = [sys.executable, __file__, "--stage", stage, part, "--dir", str(folder)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        merged |= json.loads(output.splitlines()[-1])
        print(part, stage, json.dumps(merged), file=sys.stderr, flush=True)
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("embeds.pt", "latents.pt"):
            path.unlink()
    return merged


def readme_rows(parts: dict[str, Any]) -> list[dict[str, str]]:
    """Return what the table says."""
    rows = []
    for part, compute in (("text_encoder", "encode_s"), ("transformer", "second_chunk_s"), ("vae", "decode_next_s")):
        found = parts[part]
        peak = found["run_peak"]
        rows.append(
            {
                "measure": f"full size, {part.replace('_', ' ')} of {found['parameters'] / 1e9:.2f} billion parameters",
                "value": f"load {found['load_s']:.0f} s, {compute.removesuffix('_s').replace('_', ' ')} "
                f"{found[compute]:.0f} s, peak {peak['anonymous_bytes'] / 1e9:.1f} GB private and "
                f"{peak['file_bytes'] / 1e9:.1f} GB of mapped file",
            }
        )
    return rows


def main() -> None:
    """Measure every part, or, as a child, one stage of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="folder for the files (default: a temporary one)")
    parser.add_argument("--stage", nargs=2, metavar=("STAGE", "PART"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(run_stage(*args.stage, folder=args.dir)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="full-size-") as folder:
        parts = {part: run_part_in_processes(part, Path(folder)) for part in PARTS}
    write(
        "full_size",
        {"preset": PRESET.name, "size": [SIZE, SIZE], "threads": 2, "parts": parts, "readme": readme_rows(parts)},
    )


if __name__ == "__main__":
    main()
