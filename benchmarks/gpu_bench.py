"""What the parts of gpu_check.py share: the device, random models of true sizes, a session whose window is full."""

from __future__ import annotations

import gc
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _report import spread
from torch import nn

from causal_forcing.arithmetic import pass_flops
from causal_forcing.commands.doctor import driver_version
from causal_forcing.config import TransformerConfig
from causal_forcing.engine import Engine
from causal_forcing.presets import Preset
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, SwitchPolicy, WeightedPrompt
from causal_forcing.session import Session
from causal_forcing.transformer import CausalTransformer
from causal_forcing.vae import TinyVae, WanVae
from causal_forcing.weights.initialise import draw_weight
from causal_forcing.weights.loading import build_vae, default_dtype


class Skipped(Exception):
    """A part cannot run here, and says why."""


class Failed(Exception):
    """A part ran and found that something does not hold.

    Attributes:
        result: What it measured.
    """

    def __init__(self, problem: str, result: dict[str, Any]) -> None:
        super().__init__(problem)
        self.result = result


@dataclass
class Bench:
    """One run's device and model.

    Attributes:
        device: Where everything runs.
        preset: Whose sizes.
        height: Pixel rows.
        width: Pixel columns.
        golden: Folder of golden files.
        notes: What one part leaves for a later one.
    """

    device: torch.device
    preset: Preset
    height: int
    width: int
    golden: Path
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What the engine computes in there."""
        return default_dtype(self.device)

    @property
    def device_name(self) -> str:
        """E.g. ``NVIDIA H100 80GB HBM3``."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"

    def describe(self) -> dict[str, Any]:
        """Return what a reader of the numbers has to know."""
        about = {
            "device": self.device_name,
            "torch": torch.__version__,
            "preset": self.preset.name,
            "weights": "random",
            "size": f"{self.height}x{self.width}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "window_frames": self.preset.window_frames,
            "steps": list(self.preset.denoising_steps),
        }
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(self.device)
            about |= {
                "cuda": torch.version.cuda,
                "driver": driver_version() or "unknown",
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        return about

    def need_cuda(self) -> None:
        """Raise :class:`Skipped` where there is no GPU."""
        if not self.is_cuda:
            raise Skipped("needs a CUDA device")

    def wait(self) -> None:
        """Wait for all work on the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def clean(self) -> None:
        """Give memory that nobody uses back to the device."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def fill(self, module: nn.Module) -> None:
        """Give a module on the meta device random weights on this one."""
        state = module.state_dict()
        drawn = {name: draw_weight(name, t, 0, device=self.device).to(self.dtype) for name, t in state.items()}
        module.load_state_dict(drawn, assign=True)
        module.eval().requires_grad_(False)

    @cached_property
    def engine(self) -> Engine:
        """The generator with the Wan decoder, eager, as an engine on a GPU has it."""
        engine = self.unjoined_engine()
        engine.transformer.lay_out()
        return engine

    def unjoined_engine(self) -> Engine:
        """Return the same before its weights are laid out, as quantising takes it."""
        with torch.device("meta"):
            transformer = CausalTransformer(self.preset.transformer)
        self.fill(transformer)
        return Engine(self.preset, transformer, self.vae("wan"))

    def vae(self, name: str) -> WanVae | TinyVae:
        """Return one of the preset's VAEs."""
        module, _ = build_vae(self.preset.vae_config(name))
        self.fill(module)
        return module

    def prompt(self, name: str, policy: SwitchPolicy | None = None) -> tuple[PromptUpdate, list[PromptEmbedding]]:
        """Return an update and its embedding, on the device as a text encoder would leave it; random by name."""
        return self._random_prompt(self.preset.transformer, name, policy)

    def tiny_prompt(self, engine: Engine) -> tuple[PromptUpdate, list[PromptEmbedding]]:
        """Return the same for another engine."""
        return self._random_prompt(engine.transformer.config, "first", None)

    def _random_prompt(
        self, config: TransformerConfig, name: str, policy: SwitchPolicy | None
    ) -> tuple[PromptUpdate, list[PromptEmbedding]]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(1, config.text_len, config.text_dim, generator=generator)
        embeds = drawn.to(self.device, self.dtype)
        options = {} if policy is None else {"policy": policy}
        return PromptUpdate((WeightedPrompt(name),), **options), [PromptEmbedding(embeds, name)]

    def new_session(self, **options: object) -> Session:
        """Return a fresh session with a prompt."""
        session = self.engine.new_session(self.engine.session_config(height=self.height, width=self.width, **options))
        session.update_prompt(*self.prompt("first"))
        return session

    def full_session(self) -> Session:
        """Return a session whose window is full and whose oldest frames have been evicted."""
        session = self.new_session()
        for _ in range(session.config.cache_frames // self.preset.chunk_frames + 1):
            session.generate_chunk()
        self.wait()
        return session

    def time_ms(self, call: Callable[[], object], *, repeats: int = 10, warm_ups: int = 2) -> dict[str, float]:
        """Return median, least and most milliseconds of a call, each waited for."""
        times = []
        for index in range(warm_ups + repeats):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            if index >= warm_ups:
                times.append(1000 * (time.perf_counter() - started))
        return spread(times)

    def forward_flops(self, frames_seen: int) -> int:
        """Return the operations of one denoising pass that attends to so many frames, its own included."""
        seen = frames_seen * self.new_tokens // self.preset.chunk_frames
        return pass_flops(self.preset.transformer, self.new_tokens, seen)

    @property
    def new_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.preset.chunk_frames * (self.height // 16) * (self.width // 16)


def percentiles(values: list[float]) -> dict[str, float]:
    """Return median, 90th and 99th percentile."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{p}": round(cuts[p - 1], 2) for p in (50, 90, 99)}
