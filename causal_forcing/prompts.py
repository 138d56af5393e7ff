"""What a user says, as values: weighted prompts, how they blend, and how a switch treats the past."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from causal_forcing.errors import InvalidRequest

if TYPE_CHECKING:  # a gRPC client builds these values without having torch
    from torch import Tensor

MAX_PROMPTS = 8
"""Most prompts one update may blend."""

MAX_PROMPT_CHARACTERS = 4096
"""Longest accepted prompt."""

MAX_WEIGHT = 1e6
"""Largest accepted weight."""

MAX_TRANSITION_CHUNKS = 256
"""Longest accepted transition."""


class SwitchPolicy(StrEnum):
    """What happens to the remembered frames when the prompt changes."""

    CROSS_ATTENTION = "cross_attention"
    """Only the text's keys and values change. Source: daydreamlive/scope-causal-forcing@9b193ba."""

    RECACHE = "recache"
    """Keys and values of the kept frames are recomputed under the new prompt. Source: NVlabs/LongLive v1.0."""

    FLUSH = "flush"
    """All but the sink and the last two frames are forgotten. Source: Infinity-RoPE (63d7b84)."""

    SCENE_CUT = "scene_cut"
    """Everything is forgotten; the next chunk is a first chunk again."""


class Blend(StrEnum):
    """How embeddings are mixed."""

    LINEAR = "linear"
    SLERP = "slerp"


@dataclass(frozen=True)
class WeightedPrompt:
    """One prompt of a blend.

    Attributes:
        text: What to show; 1 to 4096 characters, not blank.
        weight: Its share, a number from 0 to 1,000,000; weights are normalised to sum to 1.
    """

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise InvalidRequest("prompts.text", self.text, "must be text that is not blank", reason="INVALID_PROMPT")
        if len(self.text) > MAX_PROMPT_CHARACTERS:
            raise InvalidRequest(
                "prompts.text",
                f"{len(self.text)} characters",
                f"must be at most {MAX_PROMPT_CHARACTERS} characters",
                reason="INVALID_PROMPT",
            )
        is_number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not is_number or not 0 <= self.weight <= MAX_WEIGHT:
            raise InvalidRequest(
                "prompts.weight", self.weight, f"must be a number from 0 to {MAX_WEIGHT:,.0f}", reason="INVALID_PROMPT"
            )


@dataclass(frozen=True)
class PromptUpdate:
    """A change of prompt, applied at the next chunk boundary.

    Attributes:
        prompts: 1 to 8 weighted prompts, not all of weight 0.
        blend: How several prompts are mixed; ``slerp`` needs exactly two.
        transition_chunks: Chunks over which the old embedding becomes the new one; 0 switches at once.
        transition: How the transition interpolates.
        policy: What happens to the remembered frames.
        prompt_id: The caller's name for this update, echoed by every chunk made under it.
    """

    prompts: tuple[WeightedPrompt, ...]
    blend: Blend = Blend.LINEAR
    transition_chunks: int = 0
    transition: Blend = Blend.LINEAR
    policy: SwitchPolicy = SwitchPolicy.CROSS_ATTENTION
    prompt_id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise InvalidRequest(
                "prompts",
                f"{len(self.prompts)} prompts",
                f"must be 1 to {MAX_PROMPTS} prompts",
                reason="INVALID_PROMPT",
            )
        if sum(p.weight for p in self.prompts) <= 0:
            raise InvalidRequest(
                "prompts.weight",
                [p.weight for p in self.prompts],
                "must not all be 0",
                reason="INVALID_PROMPT",
            )
        for name, kind in (("blend", Blend), ("transition", Blend), ("policy", SwitchPolicy)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                allowed = ", ".join(kind)
                raise InvalidRequest(name, value, f"must be one of {allowed}", reason="INVALID_PROMPT") from None
        if self.blend is Blend.SLERP and len(self.prompts) != 2:
            raise InvalidRequest(
                "blend",
                f"slerp of {len(self.prompts)} prompts",
                "slerp needs exactly 2 prompts",
                reason="INVALID_PROMPT",
            )
        count = self.transition_chunks
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_TRANSITION_CHUNKS:
            raise InvalidRequest(
                "transition_chunks",
                count,
                f"must be an integer from 0 to {MAX_TRANSITION_CHUNKS}",
                reason="INVALID_PROMPT",
            )


@dataclass(frozen=True)
class PromptEmbedding:
    """The text encoder's output for one prompt.

    Attributes:
        embeds: ``[1, text_len, text_dim]``; rows past the prompt's real length are zero.
        key: Hash of model and cleaned text; equal keys mean equal embeddings.
    """

    embeds: Tensor
    key: str
