"""From Scope's runtime parameters, which come whole with every call, to what changed since the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import Blend, PromptUpdate, SwitchPolicy, WeightedPrompt

if TYPE_CHECKING:
    from .schema import CausalForcingConfig


@dataclass(frozen=True)
class Start:
    """What a stream begins with; a change of it needs a new beginning.

    Attributes:
        seed: Source of all noise.
        denoising_steps: Descending timesteps.
        image: Encoded picture that the video starts from, or None.
    """

    seed: int
    denoising_steps: tuple[int, ...]
    image: bytes | None = None


@dataclass(frozen=True)
class ChunkRequest:
    """What one call asks for.

    Attributes:
        start: Set when the stream begins anew with this call.
        update: The prompt to switch to, or None to go on.
    """

    start: Start | None
    update: PromptUpdate | None


class Parameters:
    """Remembers what was last asked for.

    Args:
        start: From the load parameters.
        policy: What a prompt switch does to the remembered frames, unless a call says otherwise.
    """

    def __init__(self, start: Start, policy: str = SwitchPolicy.CROSS_ATTENTION) -> None:
        self._start = start
        self._policy = policy
        self._running: Start | None = None
        self._prompts: PromptUpdate | None = None
        self._transition: PromptUpdate | None = None
        self._shown: PromptUpdate | None = None

    def take(self, given: Mapping[str, Any]) -> ChunkRequest | None:
        """Return what a call asks for; None as long as there has been no prompt.

        Raises:
            InvalidRequest: If a value is not allowed; nothing is remembered of the call then.
        """
        start = self._next_start(given)
        prompts = parse_prompts(given, self._policy)
        transition = parse_transition(given, self._policy)
        wanted = self._wanted(prompts, transition)
        begins = self._begins(start, given)
        self._start = start
        self._prompts, self._transition = prompts or self._prompts, transition
        if wanted is None and self._shown is None:
            return None
        if begins:
            self._running, self._shown = start, wanted or self._shown
            assert self._shown is not None
            return ChunkRequest(start, replace(self._shown, transition_chunks=0, policy=SwitchPolicy.CROSS_ATTENTION))
        self._shown = wanted or self._shown
        return ChunkRequest(None, wanted)

    def _wanted(self, prompts: PromptUpdate | None, transition: PromptUpdate | None) -> PromptUpdate | None:
        """Return the prompt to switch to: a transition's target before a prompt, each only when it is new."""
        if transition is not None and transition != self._transition:
            return transition
        if prompts is not None and prompts != self._prompts and transition is None:
            return prompts
        return None

    def _begins(self, start: Start, given: Mapping[str, Any]) -> bool:
        running = self._running
        if running is None or given.get("init_cache"):
            return True
        return bool(given.get("manage_cache", True)) and start.denoising_steps != running.denoising_steps

    def _next_start(self, given: Mapping[str, Any]) -> Start:
        steps = given.get("denoising_step_list") or self._start.denoising_steps
        seed = given.get("base_seed", self._start.seed)
        image = self._start.image
        if "first_frame_image" in given:
            image = _read(given["first_frame_image"])
        return Start(int(seed), tuple(int(step) for step in steps), image)


def chosen_numbers(config: CausalForcingConfig, *names: str) -> dict[str, Any]:
    """Return the numbers that were chosen; defaults, which are those of one model, are left to the model at hand."""
    defaults = type(config).model_fields
    return {name: getattr(config, name) for name in names if getattr(config, name) != defaults[name].default}


def parse_prompts(given: Mapping[str, Any], policy: str) -> PromptUpdate | None:
    """Return the prompts of a call (text, or a list of texts and of ``{text, weight}``); None where there are none.

    Raises:
        InvalidRequest: If they cannot be blended.
    """
    method = given.get("prompt_interpolation_method", Blend.LINEAR)
    return _update(given.get("prompts"), given, method=method, policy=policy)


def parse_transition(given: Mapping[str, Any], policy: str) -> PromptUpdate | None:
    """Return where a call's ``transition`` leads: ``{target_prompts, num_steps, temporal_interpolation_method}``.

    Raises:
        InvalidRequest: If it cannot be done.
    """
    transition = given.get("transition")
    if not transition:
        return None
    method = given.get("prompt_interpolation_method", Blend.LINEAR)
    update = _update(transition.get("target_prompts"), given, method=method, policy=policy)
    if update is None:
        return None
    steps = int(transition.get("num_steps", 4))
    name = "temporal_interpolation_method"
    temporal = _choice(name, transition.get(name, Blend.LINEAR), Blend)
    return replace(update, transition_chunks=max(0, steps), transition=temporal)


def _update(prompts: Any, given: Mapping[str, Any], *, method: str, policy: str) -> PromptUpdate | None:  # noqa: ANN401
    listed = [prompts] if isinstance(prompts, str) else prompts or ()
    weighted = tuple(prompt for prompt in map(_weighted, listed) if prompt is not None)
    if not weighted:
        return None
    if sum(prompt.weight for prompt in weighted) == 0:  # Scope takes that for equal shares
        weighted = tuple(replace(prompt, weight=1.0) for prompt in weighted)
    blend = _choice("prompt_interpolation_method", method, Blend)
    return PromptUpdate(
        prompts=weighted,
        blend=blend if len(weighted) == 2 else Blend.LINEAR,  # like Scope: slerp is for two
        policy=_choice("switch_policy", given.get("switch_policy", policy), SwitchPolicy),
    )


def _weighted(prompt: Any) -> WeightedPrompt | None:  # noqa: ANN401  (whatever Scope's API let through)
    if isinstance(prompt, Mapping):
        text, weight = prompt.get("text", ""), prompt.get("weight", 1.0)
    else:
        text, weight = prompt, 1.0
    return WeightedPrompt(text, weight) if not isinstance(text, str) or text.strip() else None


def _choice(field: str, value: str, kind: Any) -> Any:  # noqa: ANN401  (an enum of any kind)
    names: Sequence[str] = [str(known) for known in kind]
    if value not in names:
        raise InvalidRequest(field, value, f"must be one of {', '.join(names)}")
    return kind(value)


def _read(path: str | None) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest("first_frame_image", path, f"must be a readable picture ({error.strerror})") from error
