"""What a session takes of a generator's memory, by arithmetic alone; needs no torch, so that a gateway can ask."""

from __future__ import annotations

from causal_forcing.config import SessionConfig, SinkRope, TransformerConfig


def session_bytes(sizes: TransformerConfig, config: SessionConfig, itemsize: int) -> int:
    """Return the bytes of a session's self-attention cache and of its prompt's keys and values.

    The same as :func:`causal_forcing.weights.memory.required_bytes` says of one session without a decoder.

    Args:
        sizes: Of the transformer.
        config: Of the session.
        itemsize: Bytes of a cached number: 4 for float32, 2 for bfloat16.
    """
    number_bytes = sizes.num_layers * sizes.num_heads * sizes.head_dim * itemsize
    rows = 2 * config.cache_frames  # keys and values
    if config.sink_rope is SinkRope.RELATIVE:
        rows += config.sink_frames  # the sink's keys once more, without their rotation
    text_rows = 2 * sizes.text_len
    return (rows * config.geometry.tokens_per_frame + text_rows) * number_bytes
