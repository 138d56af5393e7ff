"""One user's stream: a few host integers and tensors, advanced chunk by chunk.

A session owns a :class:`SessionState` and borrows everything else from the engine. ``Session._next_chunk`` is the whole
product on one screen: apply the prompt, denoise, write the context, advance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causal_forcing.config import SessionConfig
from causal_forcing.device_errors import device_errors
from causal_forcing.errors import DeviceFault, InvalidRequest, NonFiniteOutput, OutOfMemory, SessionStateError
from causal_forcing.kv_cache import CacheLayout, KeyValueCache
from causal_forcing.noise import NoiseSource, SeededNoise
from causal_forcing.prompts import PromptEmbedding, PromptUpdate, SwitchPolicy
from causal_forcing.rope import RotaryEmbedding
from causal_forcing.sampler import Schedule, denoise
from causal_forcing.snapshot import Snapshot
from causal_forcing.state import SessionState, split_passes
from causal_forcing.stopwatch import Mark, mark, seconds_between
from causal_forcing.transfer import upload
from causal_forcing.transformer import ChunkContext

if TYPE_CHECKING:
    from causal_forcing.engine import Engine


@dataclass(frozen=True)
class Chunk:
    """One finished chunk.

    Attributes:
        index: 0, 1, 2, ...
        start_frame: Latent frame of the stream that it begins with.
        latents: ``[1, 16, F, h, w]`` clean and normalised, in the engine's dtype, on its device.
        starts_scene: Whether its first latent frame is one pixel frame, decoded with fresh decoder state.
        prompt_id: Of the update it was made under.
        prompt_applied: Whether it is the first one made under that update.
        is_finite: 0-dim bool on the device; reading it waits for the chunk, so it is left to the reader.
        after_rebuild: Whether :meth:`Session.rebuild_cache` was called right before it, as a fast restore does; an
            exact restore has to repeat that.
        context_marks: Before and after its context pass.
    """

    index: int
    start_frame: int
    latents: Tensor
    starts_scene: bool
    prompt_id: str
    prompt_applied: bool
    is_finite: Tensor
    after_rebuild: bool = False
    context_marks: tuple[Mark, Mark] | None = field(default=None, compare=False)

    @property
    def context_s(self) -> float:
        """Seconds of its context pass; on a GPU only known once something has waited for the chunk."""
        return seconds_between(*self.context_marks) if self.context_marks else 0.0

    def require_finite(self) -> None:
        """Wait for the chunk and check it.

        Raises:
            NonFiniteOutput: If the latents hold NaN or infinity.
        """
        if not bool(self.is_finite):
            raise NonFiniteOutput(f"chunk {self.index} holds NaN or infinity", metadata={"chunk": str(self.index)})


class Session:
    """One user's stream. Its calls must not overlap; different sessions of one engine may take turns in any order.

    Attributes:
        engine: The shared weights.
        config: What the user asked for.
        state: All that belongs to this user.
        rebuilds: Times that the cache was recomputed so far.
    """

    def __init__(self, engine: Engine, config: SessionConfig, *, noise: NoiseSource | None = None) -> None:
        self.engine = engine
        self.config = config
        self._noise = noise or SeededNoise(config.seed)
        transformer, device = engine.transformer, engine.device
        with torch.inference_mode():
            self._schedule = Schedule.of(
                transformer, config.denoising_steps, config.first_chunk_steps, shift=engine.preset.shift
            )
            self._rotary = RotaryEmbedding(transformer.config, config.geometry, device)
            cache = KeyValueCache(transformer.config, cache_layout(config), device=device, dtype=engine.dtype)
            decoder = engine.vae.new_decoder_state(config.geometry) if engine.vae else None
        self.state = SessionState(cache, decoder)
        self.rebuilds = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the session's state."""
        return self.state.nbytes

    def update_prompt(self, update: PromptUpdate, embeddings: Sequence[PromptEmbedding] | None = None) -> None:
        """Set what the next chunk shows; an update not yet applied is replaced.

        Args:
            update: The prompts and how to switch to them.
            embeddings: One per prompt, in order; None asks the engine's text encoder.

        Raises:
            InvalidRequest: If the embeddings do not fit the prompts or the model.
        """
        made = self.engine.encode_prompts(update) if embeddings is None else list(embeddings)
        if len(made) != len(update.prompts):
            raise InvalidRequest(
                "embeddings", f"{len(made)} embeddings", f"must be {len(update.prompts)}, one per prompt"
            )
        expected = (1, self.engine.transformer.config.text_len, self.engine.transformer.config.text_dim)
        for embedding in made:
            if tuple(embedding.embeds.shape) != expected:
                raise InvalidRequest("embeddings", tuple(embedding.embeds.shape), f"must have shape {expected}")
        self.state.prompt.submit(update, made)

    def start_from(self, latents: Tensor) -> Chunk:
        """Begin with given clean latents (an encoded image or video); return them as chunk 0.

        Args:
            latents: ``[1, 16, F, h, w]`` normalised; F = 1 for an image.

        Raises:
            SessionStateError: If chunks were already made, or no prompt is set.
            InvalidRequest: If the shape does not fit the session, or a session without a window has no room for it.
        """
        state, chunk_frames = self.state, self.engine.preset.chunk_frames
        if state.position:
            raise SessionStateError("start_from must come before the first chunk", reason="ALREADY_STARTED")
        frames = latents.shape[2] if latents.ndim == 5 else 0
        if frames < 1 or tuple(latents.shape) != self.config.geometry.latent_shape(frames):
            wanted = list(self.config.geometry.latent_shape(1))
            raise InvalidRequest("latents", list(latents.shape), f"must be {wanted}, with 1 or more frames")
        room = self.config.cache_frames - chunk_frames
        if self.config.window_frames is None and frames > room:
            raise InvalidRequest("latents", f"{frames} frames", f"must be at most {room} without a window")
        with self._device_work():
            self._cross_boundary()
            given = latents.to(self.engine.device, self.engine.dtype)
            with self._position_kept_on_error():
                for part in split_passes(given, chunk_frames):
                    self._append(part, self._open_chunk(part.shape[2]))
                return self._commit(given, start=0, starts_scene=True, given=True)

    def generate_chunk(self, *, should_stop: Callable[[], bool] | None = None) -> Chunk:
        """Return the next chunk; it is committed, or the session stays where it was and the call may be repeated.

        Args:
            should_stop: Asked before every denoising step.

        Raises:
            Stopped: If ``should_stop`` said so.
            SessionStateError: If no prompt is set, the stream is full, or the session has failed.
            OutOfMemory: If the device ran out of memory; the session has failed.
            DeviceFault: If the device failed; the session has failed.
        """

        def sample(context: ChunkContext) -> Tensor:
            transformer, draw_noise = self.engine.transformer, self._noise_for(context.plan.frames)
            steps = self._schedule.steps if self.state.scene_chunks else self._schedule.first_steps
            return denoise(lambda x, modulation: transformer(x, modulation, context), draw_noise, steps, should_stop)

        return self._next_chunk(sample)

    def replay_chunk(self, latents: Tensor) -> Chunk:
        """Return the next chunk made of recorded latents: as :meth:`generate_chunk`, without the denoising."""
        return self._next_chunk(lambda _context: latents.to(self.engine.device, self.engine.dtype))

    def decode(self, chunk: Chunk) -> Tensor:
        """Return the chunk's pixels ``[1, 3, f, H, W]`` in [-1, 1], float32; chunks must come in order.

        Raises:
            NonFiniteOutput: If the chunk is not finite; the session has failed.
            SessionStateError: If the engine was loaded without a VAE.
        """
        try:
            chunk.require_finite()
        except NonFiniteOutput:
            self.state.failed = "non-finite output"
            raise
        if self.engine.vae is None or self.state.decoder is None:
            raise SessionStateError("the engine was loaded without a VAE", reason="NO_VAE")
        with self._device_work():
            if chunk.starts_scene:
                self.state.decoder.reset()
            return self.engine.vae.decode(chunk.latents, self.state.decoder).float()

    def reset(self) -> None:
        """Return to the state of a fresh session (no prompt, no frames), keeping the allocations."""
        self.state.reset()

    def snapshot(self) -> Snapshot:
        """Return a copy of the whole state, from which :meth:`restore` continues bit for bit.

        Raises:
            SessionStateError: If the session has failed.
        """
        return Snapshot.take(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Replace the whole state; nothing changes if the snapshot does not fit.

        Raises:
            InvalidRequest: If it is of another model or configuration, or a part is missing, extra or misshapen.
        """
        snapshot.apply(self)

    def rebuild_cache(self) -> None:
        """Recompute the keys and values of every held frame from its latents, under the prompt in force.

        Oldest first, in the context passes that first wrote them. This is what the ``recache`` policy, an anchor and a
        fast restore do. Every frame keeps its position; frames that were evicted no longer have an influence.
        """
        self.state.rebuilt_chunk = self.state.chunk_index
        self._rebuild()

    def _rebuild(self) -> None:
        cache = self.state.cache
        self.rebuilds += 1
        with self._device_work(), self._position_kept_on_error():
            runs = self.state.held_runs()
            self.state.cache_is_stale = True
            cache.rewind(ring_start=cache.cursor.origin + cache.layout.sink_frames, end=cache.cursor.origin)
            for start, latents in runs:
                if start != cache.cursor.end:  # evicted frames lie before it
                    cache.rewind(ring_start=start, end=start)
                self._append(latents, self._open_chunk(latents.shape[2]))
        self.state.cache_is_stale = False

    def _next_chunk(self, make_latents: Callable[[ChunkContext], Tensor]) -> Chunk:
        with self._device_work():
            self._cross_boundary()
            start, starts_scene = self.state.position, self.state.begins_scene
            with self._position_kept_on_error():
                context = self._open_chunk(self.engine.preset.chunk_frames)
                latents = make_latents(context)
                before = mark(self.engine.device)
                self._append(latents, context)
                marks = (before, mark(self.engine.device))
                return self._commit(latents, start=start, starts_scene=starts_scene, context_marks=marks)

    def _cross_boundary(self) -> None:
        """Make the next chunk's prompt current and the cache ready for it.

        Bookkeeping comes first and happens once per chunk; the device work after it is done again by the next try if it
        breaks off.
        """
        state = self.state
        full = not state.cache.has_room(self.engine.preset.chunk_frames)
        change = state.prompt.begin_chunk(state.chunk_index, full=full)
        if change is not None:
            state.text = None
            state.forget(change)
            state.cache_is_stale |= change.policy is SwitchPolicy.RECACHE
        every = self.config.anchor_every_chunks
        if every is not None and state.chunk_index % every == 0:
            state.cache_is_stale = True  # an anchor: an exact restore can start here
        if state.text is None:
            assert state.prompt.embeds is not None
            state.text = self.engine.transformer.read_text(state.prompt.embeds)
        if state.cache_is_stale:
            self._rebuild()

    def _open_chunk(self, frames: int) -> ChunkContext:
        """Return the context of the next frames, with the sink's keys rotated to where these frames expect them."""
        cache, text = self.state.cache, self.state.text
        assert text is not None
        plan = cache.plan(frames)
        sink = cache.sink_positions(plan)
        if sink is not None:
            self.engine.transformer.rotate_sink(cache, self._rotary.rotation(sink))
        return ChunkContext(cache, plan, self._rotary.rotation(range(plan.start, plan.start + frames)), text)

    def _noise_for(self, frames: int) -> Callable[[int], Tensor]:
        shape, chunk = self.config.geometry.latent_shape(frames), self.state.chunk_index
        device, dtype = self.engine.device, self.engine.dtype
        return lambda draw: upload(self._noise(chunk, draw, shape), device, dtype)

    def _append(self, latents: Tensor, context: ChunkContext) -> None:
        """Write the keys and values of clean frames, and move the position past them."""
        self.engine.transformer.write_context(latents, self._schedule.context, context)
        self.state.cache.advance(context.plan)

    def _commit(
        self,
        latents: Tensor,
        *,
        start: int,
        starts_scene: bool,
        given: bool = False,
        context_marks: tuple[Mark, Mark] | None = None,
    ) -> Chunk:
        state, prompt = self.state, self.state.prompt
        assert prompt.update is not None
        chunk = Chunk(
            index=state.chunk_index,
            start_frame=start,
            latents=latents,
            starts_scene=starts_scene,
            prompt_id=prompt.update.prompt_id,
            prompt_applied=not prompt.announced,
            is_finite=torch.isfinite(latents).all(),
            after_rebuild=state.rebuilt_chunk == state.chunk_index,
            context_marks=context_marks,
        )
        state.remember(latents, self.engine.preset.chunk_frames)
        state.chunk_index += 1
        state.scene_chunks += not given
        prompt.announced = True
        return chunk

    @contextmanager
    def _position_kept_on_error(self) -> Iterator[None]:
        """Put the stream position back where it was unless the enclosed work runs to its end.

        Rows that the work has written by then are either past that position or written again by the next try.
        """
        cache = self.state.cache
        before = cache.cursor
        try:
            yield
        except BaseException:
            cache.cursor = before
            raise

    @contextmanager
    def _device_work(self) -> Iterator[None]:
        """Run device work; a device error fails the session for good, any other leaves it usable."""
        if self.state.failed:
            raise SessionStateError(f"the session has failed: {self.state.failed}", reason="SESSION_FAILED")
        try:
            with torch.inference_mode(), device_errors():
                yield
        except (OutOfMemory, DeviceFault) as error:
            self.state.failed = "out of memory" if isinstance(error, OutOfMemory) else "device fault"
            raise


def cache_layout(config: SessionConfig) -> CacheLayout:
    """Return the cache a session of this configuration needs."""
    return CacheLayout(
        capacity=config.cache_frames,
        sink_frames=config.sink_frames,
        sink_rope=config.sink_rope,
        tokens_per_frame=config.geometry.tokens_per_frame,
        evicts=config.window_frames is not None,
    )
