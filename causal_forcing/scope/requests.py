"""From Scope's runtime parameters, which come whole with every call, to what changed since the last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causal_forcing.errors import CausalForcingError, InvalidRequest
from causal_forcing.prompts import Blend, PromptUpdate, SwitchPolicy, WeightedPrompt

if TYPE_CHECKING:
    from .schema import CausalForcingConfig


@dataclass(frozen=True)
class Start:
    """What a stream begins with; a change of it needs a new beginning.

    Attributes:
        seed: Source of all noise.
        denoising_steps: Descending timesteps; empty for the model's own.
        image: Encoded picture that the video starts from, or None.
    """

    seed: int
    denoising_steps: tuple[int, ...] = ()
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


class RefusedPrompt(CausalForcingError):
    """Raised when a server does not show a prompt; the stream goes on under the one before it.

    Attributes:
        retry_after_s: When it may be sent again; None where that makes no sense.
    """

    default_reason = "PROMPT_REFUSED"

    def __init__(self, message: str, *, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class _Asked:
    """What the calls so far have asked for.

    Attributes:
        start: What the next beginning takes.
        running: What the stream began with; None before it has.
        prompts: The last prompts that came.
        transition: Of the last call.
        shown: What the stream shows, or is on its way to.
    """

    start: Start
    running: Start | None = None
    prompts: PromptUpdate | None = None
    transition: PromptUpdate | None = None
    shown: PromptUpdate | None = None


class Parameters:
    """Remembers what was last asked for.

    Args:
        start: From the load parameters.
        policy: What a prompt switch does to the remembered frames, unless a call says otherwise.
        default_steps: Steps that stand for the model's own.
        clock: Seconds on a clock that only goes forward.
    """

    def __init__(
        self,
        start: Start,
        policy: str = SwitchPolicy.CROSS_ATTENTION,
        *,
        default_steps: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._default_steps = tuple(default_steps)
        self._clock = clock
        self._asked = self._before_call = self._before_switch = _Asked(start)
        self._retry_s: float | None = None  # when a refused prompt may be asked for again

    def take(self, given: Mapping[str, Any]) -> ChunkRequest | None:
        """Return what a call asks for; None as long as there has been no prompt.

        Raises:
            InvalidRequest: If a value is not allowed; nothing is remembered of the call then.
        """
        before = self._asked
        start = self._next_start(given)
        prompts = parse_prompts(given, self._policy)
        transition = parse_transition(given, self._policy)
        known = self._before_switch if self._may_retry() else before
        wanted = _wanted(prompts, transition, known)
        shown = wanted or before.shown
        begins = shown is not None and self._begins(start, given)
        self._before_call = before
        self._asked = _Asked(start, start if begins else before.running, prompts or before.prompts, transition, shown)
        if begins or wanted is not None:
            self._before_switch, self._retry_s = known, None
        if shown is None:
            return None
        if begins:
            return ChunkRequest(start, replace(shown, transition_chunks=0, policy=SwitchPolicy.CROSS_ATTENTION))
        return ChunkRequest(None, wanted)

    def take_back(self) -> None:
        """Forget the last call: something that it asked for is not allowed."""
        self._asked = self._before_call

    def refused(self, retry_after_s: float | None) -> None:
        """Forget that the prompt of the last switch is shown; after so many seconds the same one is a new one."""
        self._asked = replace(self._asked, shown=self._before_switch.shown)
        self._retry_s = None if retry_after_s is None else self._clock() + retry_after_s

    def _may_retry(self) -> bool:
        return self._retry_s is not None and self._clock() >= self._retry_s

    def _begins(self, start: Start, given: Mapping[str, Any]) -> bool:
        running = self._asked.running
        if running is None or given.get("init_cache"):
            return True
        return bool(given.get("manage_cache", True)) and start.denoising_steps != running.denoising_steps

    def _next_start(self, given: Mapping[str, Any]) -> Start:
        start = self._asked.start
        seed = given.get("base_seed", start.seed)
        image = _read(given["first_frame_image"]) if "first_frame_image" in given else start.image
        steps = tuple(int(step) for step in given.get("denoising_step_list") or ())
        if not steps:
            return Start(int(seed), start.denoising_steps, image)
        return Start(int(seed), () if steps == self._default_steps else steps, image)


def _wanted(prompts: PromptUpdate | None, transition: PromptUpdate | None, known: _Asked) -> PromptUpdate | None:
    """Return the prompt to switch to: a transition's target before a prompt, each only when it is new."""
    if transition is not None and transition != known.transition:
        return transition
    if prompts is not None and prompts != known.prompts and transition is None:
        return prompts
    return None


def chosen_numbers(config: CausalForcingConfig, *names: str) -> dict[str, Any]:
    """Return the parameters that were chosen; defaults, which are those of one model, are left to the model at hand."""
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
