"""Self-attention keys and values of one session: a preallocated ring of latent frames behind fixed sink frames.

Rows of one layer, in units of latent frames:

    | sink 0 .. S-1 | ring slot 0 | ring slot 1 | ... | ring slot R-1 |        S + R = capacity

A new frame overwrites the slot of the frame that falls out of the window; nothing is ever shifted or copied. Attention
does not care about the order of rows, because every key carries its own position. All bookkeeping is host integers.

Sink keys either stay where they were rotated (``fixed``), or are also kept un-rotated and, once per chunk, rotated to
the positions directly before the rolling part (``relative``). The rolling part needs no such care: rotary scores depend
on position differences alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from causal_forcing.config import SinkRope, TransformerConfig
from causal_forcing.cursor import CacheCursor
from causal_forcing.errors import SessionStateError


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of a cache.

    Attributes:
        capacity: Latent frames it holds.
        sink_frames: How many of them are sink.
        sink_rope: Where the sink's keys are rotated to.
        tokens_per_frame: Rows of one latent frame.
        evicts: Whether the oldest frame makes room; without, a full cache is an error.
    """

    capacity: int
    sink_frames: int
    sink_rope: SinkRope
    tokens_per_frame: int
    evicts: bool

    @property
    def ring_frames(self) -> int:
        """Slots that roll."""
        return self.capacity - self.sink_frames


@dataclass(frozen=True)
class CachePlan:
    """Where one forward pass reads and writes.

    The rows to write are a tensor, made on the device, so that one compiled graph writes anywhere.

    Attributes:
        start: Position of its first new frame.
        slots: The cache's frame that each new frame goes to.
        rows: ``[L]`` int64, the cache row of each new token: those of ``slots``.
        visible_rows: Rows that attention reads, from row 0; the new ones are among them.
        sink_tokens: How many of the new tokens, from the first, are the sink's and are also kept un-rotated.
    """

    start: int
    slots: tuple[int, ...]
    rows: Tensor = field(compare=False, repr=False)
    visible_rows: int
    sink_tokens: int

    @property
    def frames(self) -> int:
        """New frames."""
        return len(self.slots)


@dataclass(frozen=True)
class LayerMemory:
    """One layer's tensors of a cache: no layer number in it, so that one compiled graph serves every layer.

    Attributes:
        keys: ``[1, H, capacity * tokens_per_frame, D]``, after RMSNorm and rotation.
        values: The same shape.
        sink_keys: ``[1, H, S * tokens_per_frame, D]`` before rotation, or None.
    """

    keys: Tensor
    values: Tensor
    sink_keys: Tensor | None = None

    def write(self, keys: Tensor, values: Tensor, plan: CachePlan) -> None:
        """Store a forward pass's keys and values; a later pass with the same plan overwrites the same rows.

        Args:
            keys: ``[1, H, L, D]``, rotated.
            values: The same shape.
            plan: Of this pass.
        """
        self.keys.index_copy_(2, plan.rows, keys)
        self.values.index_copy_(2, plan.rows, values)

    def write_sink(self, keys: Tensor, plan: CachePlan) -> None:
        """Store the un-rotated keys ``[1, H, L, D]`` of those new tokens that are the sink's."""
        if self.sink_keys is not None and plan.sink_tokens:
            self.sink_keys.index_copy_(2, plan.rows[: plan.sink_tokens], keys[:, :, : plan.sink_tokens])

    def read(self, plan: CachePlan) -> tuple[Tensor, Tensor]:
        """Return views of the keys and values that a pass attends to, ``[1, H, visible_rows, D]``."""
        rows = plan.visible_rows
        if rows == self.keys.shape[2]:  # said explicitly for the compiler: a full window is a graph of static shapes
            return self.keys, self.values
        return self.keys[:, :, :rows], self.values[:, :, :rows]


class KeyValueCache:
    """Keys and values of every layer for one session.

    Attributes:
        layout: Its sizes.
        cursor: Which frames it holds.
        keys: Per layer ``[1, H, capacity * tokens_per_frame, D]``, after RMSNorm and rotation.
        values: Per layer, the same shape.
        sink_keys: Per layer ``[1, H, S * tokens_per_frame, D]`` before rotation; empty unless sinks are ``relative``.
    """

    def __init__(
        self, config: TransformerConfig, layout: CacheLayout, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self.cursor = CacheCursor(ring_start=layout.sink_frames)
        shape = (1, config.num_heads, layout.capacity * layout.tokens_per_frame, config.head_dim)
        sink_shape = (1, config.num_heads, layout.sink_frames * layout.tokens_per_frame, config.head_dim)
        keep_sink = layout.sink_frames > 0 and layout.sink_rope is SinkRope.RELATIVE

        def allocate(size: tuple[int, ...]) -> list[Tensor]:
            return [torch.zeros(size, device=device, dtype=dtype) for _ in range(config.num_layers)]

        self.keys = allocate(shape)
        self.values = allocate(shape)
        self.sink_keys = allocate(sink_shape) if keep_sink else []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys, *self.values, *self.sink_keys))

    def has_room(self, frames: int) -> bool:
        """Return whether that many more latent frames fit, or make room for themselves."""
        return self.layout.evicts or self._held_frames(self.cursor.end + frames) <= self.layout.capacity

    def plan(self, frames: int) -> CachePlan:
        """Return where the next ``frames`` latent frames go.

        Raises:
            SessionStateError: If the cache never evicts and has no room (reason ``STREAM_FULL``).
        """
        cursor, layout = self.cursor, self.layout
        held = self._held_frames(cursor.end + frames)
        if not self.has_room(frames):
            raise SessionStateError(
                f"a session without a window holds {layout.capacity} latent frames; {cursor.end - cursor.origin} are "
                f"written and {frames} more do not fit: set window_frames for an endless stream",
                reason="STREAM_FULL",
            )
        tokens = layout.tokens_per_frame
        slots = tuple(self._slot(cursor.end + i) for i in range(frames))
        new_sink = max(0, min(frames, cursor.origin + layout.sink_frames - cursor.end))
        return CachePlan(
            start=cursor.end,
            slots=slots,
            rows=torch.cat([torch.arange(s * tokens, (s + 1) * tokens, device=self.keys[0].device) for s in slots]),
            visible_rows=min(held, layout.capacity) * tokens,
            sink_tokens=new_sink * tokens if self.sink_keys else 0,
        )

    def sink_positions(self, plan: CachePlan) -> range | None:
        """Return the positions the sink must be rotated to for this plan, or None if its keys are right as they are.

        They change only when the window's oldest rolling frame does, and never in ``fixed`` layouts.
        """
        if not self.sink_keys:
            return None
        end = plan.start + plan.frames
        oldest = max(self.cursor.ring_start, end - self.layout.ring_frames)
        if oldest == self.cursor.origin + self.layout.sink_frames:
            return None
        return range(oldest - self.layout.sink_frames, oldest)

    def layer(self, layer: int) -> LayerMemory:
        """Return one layer's tensors."""
        return LayerMemory(self.keys[layer], self.values[layer], self.sink_keys[layer] if self.sink_keys else None)

    def advance(self, plan: CachePlan) -> None:
        """Commit a plan: its frames are now part of the past."""
        self.cursor = replace(self.cursor, end=plan.start + plan.frames)

    def skip(self, frames: int) -> None:
        """Count frames as held without writing them; a rebuild must follow before anything reads."""
        self.cursor = replace(self.cursor, end=self.cursor.end + frames)

    def begin_scene(self) -> None:
        """Forget everything; the next frame is the first of a scene, at the position that follows."""
        end = self.cursor.end
        self.cursor = CacheCursor(origin=end, ring_start=end + self.layout.sink_frames, end=end)

    def flush(self, keep_frames: int) -> None:
        """Forget all but the sink and the newest frames, which move to the start of the ring.

        Args:
            keep_frames: Newest frames to keep; fewer rolling frames than that leave the cache as it is.
        """
        cursor, tokens = self.cursor, self.layout.tokens_per_frame
        first = cursor.end - keep_frames
        if first <= self._held()[1].start:
            return
        old = [self._slot(first + i) for i in range(keep_frames)]
        self.cursor = replace(cursor, ring_start=first)
        new = [self._slot(first + i) for i in range(keep_frames)]
        for tensor in (*self.keys, *self.values):
            kept = torch.cat([tensor[:, :, s * tokens : (s + 1) * tokens] for s in old], dim=2)
            tensor[:, :, new[0] * tokens : (new[0] + keep_frames) * tokens] = kept

    def rewind(self, *, ring_start: int, end: int) -> None:
        """Set the cursor for a rebuild, whose passes then fill the cache again from ``end``."""
        self.cursor = replace(self.cursor, ring_start=ring_start, end=end)

    def held_positions(self) -> list[int]:
        """Return the positions of all frames that are held, oldest first."""
        sink, rolling = self._held()
        return [*sink, *rolling]

    def in_order(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return copies of a layer's keys and values, ``[1, H, capacity * tokens, D]``, oldest frame first.

        Rows of frames not yet written are zero.
        """
        tokens = self.layout.tokens_per_frame
        held = [self._slot(p) for p in self.held_positions()]
        slots = held + [s for s in range(self.layout.capacity) if s not in held]
        rows = torch.cat([torch.arange(s * tokens, (s + 1) * tokens) for s in slots])
        return self.keys[layer][:, :, rows], self.values[layer][:, :, rows]

    def _held(self) -> tuple[range, range]:
        return self.cursor.held(self.layout.sink_frames, self.layout.ring_frames)

    def _held_frames(self, end: int) -> int:
        sink_held = min(self.layout.sink_frames, end - self.cursor.origin)
        return sink_held + max(0, end - self.cursor.ring_start)

    def _slot(self, position: int) -> int:
        sink = self.layout.sink_frames
        if position < self.cursor.origin + sink:
            return position - self.cursor.origin
        return sink + (position - self.cursor.ring_start) % self.layout.ring_frames
