"""The optimiser of every stage: Muon for matrices and convolutions, AdamW for the rest.

State is a flat dictionary of tensors, so that it saves to safetensors and resumes bit for bit. Matrices of one shape
are updated together: on a GPU a small model's step is otherwise thousands of launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration. Source: Jordan et al., Muon (2024)."""


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrices, approximately.

    Args:
        matrix: ``[..., rows, columns]`` float32.
        iterations: Newton-Schulz steps.

    Source: Jordan et al., Muon (2024).
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


def is_matrix(name: str, value: Tensor) -> bool:
    """Return whether a parameter is trained by Muon: a weight that maps features to features."""
    tables = ("embed", "shared", "modulation", "gamma", "relative_attention_bias")
    return value.ndim >= 2 and min(value.shape[:2]) > 3 and not any(word in name for word in tables)


@dataclass(frozen=True)
class _Matrices:
    """Matrices of one flattened shape, and their momentum as one tensor ``[count, rows, columns]``."""

    names: tuple[str, ...]
    momentum: Tensor


class Optimizer:
    """Updates named parameters in place.

    Args:
        parameters: By name; they are changed by :meth:`step`.
        matrix: Chooses the parameters that Muon trains.
    """

    def __init__(self, parameters: Mapping[str, Tensor], matrix: Callable[[str, Tensor], bool] = is_matrix) -> None:
        self.parameters = dict(parameters)
        self.matrices = {name for name, value in self.parameters.items() if matrix(name, value)}
        self.state: dict[str, Tensor] = {}
        self._groups = [self._group(names) for names in self._by_shape()]
        self._others = [name for name in self.parameters if name not in self.matrices]
        for name in self._others:
            for moment in ("first", "second"):
                self.state[f"{name}/{moment}"] = torch.zeros_like(self.parameters[name]).detach()

    def _by_shape(self) -> list[tuple[str, ...]]:
        shapes: dict[torch.Size, list[str]] = {}
        for name, value in self.parameters.items():
            if name in self.matrices:
                shapes.setdefault(value.flatten(1).shape, []).append(name)
        return [tuple(names) for names in shapes.values()]

    def _group(self, names: tuple[str, ...]) -> _Matrices:
        first = self.parameters[names[0]]
        momentum = torch.zeros(len(names), *first.flatten(1).shape, device=first.device)
        for name, row in zip(names, momentum, strict=True):
            self.state[f"{name}/first"] = row.view(self.parameters[name].shape)
        return _Matrices(names, momentum)

    @torch.no_grad()
    def step(self, step: int, learning_rate: float) -> Tensor:
        """Apply one update from the parameters' gradients and clear them.

        Args:
            step: Number of updates made before.
            learning_rate: Root mean square of a Muon update is 0.2 of this, about that of an AdamW update.

        Returns:
            The norm of the gradients before clipping to 1, 0-dim.
        """
        grads = {
            name: torch.zeros_like(value) if value.grad is None else value.grad
            for name, value in self.parameters.items()
        }
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads.values()))))
        scale = (CLIP_NORM / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(grads.values()), scale)
        for group in self._groups:
            self._muon(group, grads, learning_rate)
        if self._others:
            self._adam([grads[name] for name in self._others], step, learning_rate)
        for value in self.parameters.values():
            value.grad = None
        found: Tensor = norm
        return found

    def _muon(self, group: _Matrices, grads: Mapping[str, Tensor], learning_rate: float) -> None:
        grad = torch.stack([grads[name].flatten(1) for name in group.names])
        group.momentum.mul_(MOMENTUM).add_(grad)
        update = orthogonalise(grad + MOMENTUM * group.momentum)
        update = update * (0.2 * math.sqrt(max(update.shape[1:])))
        values = [self.parameters[name] for name in group.names]
        torch._foreach_mul_(values, 1 - learning_rate * WEIGHT_DECAY)
        changes = [row.reshape(value.shape) for row, value in zip(update, values, strict=True)]
        torch._foreach_add_(values, changes, alpha=-learning_rate)

    def _adam(self, grads: list[Tensor], step: int, learning_rate: float) -> None:
        first, second = ([self.state[f"{name}/{moment}"] for name in self._others] for moment in ("first", "second"))
        torch._foreach_lerp_(first, grads, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, grads, grads, 1 - BETAS[1])
        spread = torch._foreach_sqrt(torch._foreach_div(second, 1 - BETAS[1] ** (step + 1)))
        torch._foreach_add_(spread, 1e-8)
        values = [self.parameters[name] for name in self._others]
        torch._foreach_addcdiv_(values, first, spread, -learning_rate / (1 - BETAS[0] ** (step + 1)))
