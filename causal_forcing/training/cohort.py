"""Sessions that run in step as one batch: with 16 tokens a frame, one session by itself is mostly overhead.

A cohort is a production :class:`~causal_forcing.session.Session` whose tensors have a row for each member. Every member
has its own prompt and its own seeded noise; a test holds each equal to a session of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from causal_forcing.config import SessionConfig, VaeConfig
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest
from causal_forcing.media import Frames, to_frames
from causal_forcing.noise import SeededNoise
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, WeightedPrompt
from causal_forcing.sampler import Stopped
from causal_forcing.session import Chunk, Session
from causal_forcing.training import whole_clip
from causal_forcing.transformer import ChunkContext
from causal_forcing.vae.wan import WanVae


@dataclass(frozen=True)
class CohortNoise:
    """Each member's own seeded noise.

    Attributes:
        seeds: One a member.
    """

    seeds: tuple[int, ...]

    def __call__(self, chunk: int, draw: int, shape: tuple[int, ...]) -> Tensor:
        """Return the noise of all members, ``[B, C, F, h, w]``."""
        return torch.cat([SeededNoise(seed)(chunk, draw, shape) for seed in self.seeds])


class EulerSession(Session):
    """A session that follows the flow's ODE by Euler's method, which a teacher needs; a student jumps and is noised."""

    def generate_chunk(self, *, should_stop: Callable[[], bool] | None = None) -> Chunk:
        """Return the next chunk, as :meth:`Session.generate_chunk`."""

        def sample(context: ChunkContext) -> Tensor:
            steps = self._schedule.steps if self.state.scene_chunks else self._schedule.first_steps
            x = self._noise_for(context.plan.frames)(0)
            for step, following in pairwise((*steps, None)):
                if should_stop is not None and should_stop():
                    raise Stopped
                assert step is not None
                lower = 0.0 if following is None else following.level.sigma
                x = x + (lower - step.level.sigma) * self.engine.transformer(x, step.modulation, context)
            return x

        return self._next_chunk(sample)


class Cohort:
    """A batch of sessions of one configuration.

    Args:
        engine: With a text encoder.
        config: Of every member, but for the seed.
        seeds: One a member.
        euler: Whether to sample as :class:`EulerSession`.
    """

    def __init__(self, engine: Engine, config: SessionConfig, seeds: Sequence[int], *, euler: bool = False) -> None:
        self.engine, self.size = engine, len(seeds)
        kind = EulerSession if euler else Session
        self.session = kind(replace(engine, vae=None), config, noise=CohortNoise(tuple(seeds)))
        cache = self.session.state.cache
        with torch.inference_mode():
            for tensors in (cache.keys, cache.values, cache.sink_keys):
                tensors[:] = [tensor.repeat(self.size, 1, 1, 1) for tensor in tensors]

    def update_prompt(self, prompts: Sequence[str], **how: object) -> None:
        """Let each member's prompt wait for the next chunk; ``how`` are further fields of the update."""
        self.submit([PromptUpdate((WeightedPrompt(text),), **how) for text in prompts])  # type: ignore[arg-type]

    def submit(self, updates: Sequence[PromptUpdate]) -> None:
        """Let each member's update wait for the next chunk; they differ in the texts of their prompts alone."""
        rows = [self.engine.encode_prompts(update) for update in updates]
        joined = [
            PromptEmbedding(torch.cat([embedding.embeds for embedding in column]), "")
            for column in zip(*rows, strict=True)
        ]
        self.session.state.prompt.submit(updates[0], joined)

    def latents(self, frames: int) -> Iterator[Tensor]:
        """Iterate over the chunks of the next latent frames, ``[B, 16, f, h, w]`` each."""
        for _ in range(frames // self.engine.preset.chunk_frames):
            yield self.session.generate_chunk().latents


TOGETHER = 2
"""Clips that are decoded at a time on a CPU: one alone leaves oneDNN if there is one thread, which takes six times as
long (torch 2.13), more are no faster (measured)."""


@torch.inference_mode()
def decode(engine: Engine, latents: Tensor) -> list[Frames]:
    """Return the pixels ``[T, H, W, 3]`` of whole clips that begin a scene, as the streaming VAE makes them.

    Args:
        engine: With a VAE of the Wan family.
        latents: ``[B, 16, F, h, w]`` normalised.

    Raises:
        InvalidRequest: If the VAE is of another family (field ``vae``).
    """
    if not isinstance(engine.vae, WanVae):
        raise InvalidRequest("vae", type(engine.vae).__name__, "must be of the Wan family (wan, lightvae)")
    parameters, config = dict(engine.vae.named_parameters()), engine.vae.config
    parts = torch.split(denormalised(latents, config), TOGETHER)
    clips = (clip for part in parts for clip in torch.split(whole_clip.decode(parameters, config, part), 1))
    return [to_frames(clip.clamp(-1, 1)) for clip in clips]


def denormalised(latents: Tensor, config: VaeConfig) -> Tensor:
    """Return normalised latents ``[B, 16, F, h, w]`` as a VAE's decoder reads them."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latent_mean, config.latent_std))
    return latents * std + mean
