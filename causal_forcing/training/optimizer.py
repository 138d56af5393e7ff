"""The optimiser of every stage: Muon for matrices and convolutions, AdamW for the rest.

State is a flat dictionary of tensors, so that it saves to safetensors and resumes bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration. Source: Jordan et al., Muon (2024)."""


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrix, approximately.

    Args:
        matrix: ``[rows, columns]`` float32.
        iterations: Newton-Schulz steps.

    Source: Jordan et al., Muon (2024).
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.T if tall else x
    return result


def is_matrix(name: str, value: Tensor) -> bool:
    """Return whether a parameter is trained by Muon: a weight that maps features to features."""
    tables = ("embed", "shared", "modulation", "gamma", "relative_attention_bias")
    return value.ndim >= 2 and min(value.shape[:2]) > 3 and not any(word in name for word in tables)


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
        for name, value in self.parameters.items():
            self.state[f"{name}/first"] = torch.zeros_like(value, memory_format=torch.contiguous_format).detach()
            if name not in self.matrices:
                self.state[f"{name}/second"] = torch.zeros_like(value).detach()

    @torch.no_grad()
    def step(self, step: int, learning_rate: float) -> float:
        """Apply one update from the parameters' gradients and clear them.

        Args:
            step: Number of updates made before.
            learning_rate: Root mean square of a Muon update is 0.2 of this, about that of an AdamW update.

        Returns:
            The norm of the gradients before clipping to 1.
        """
        found = {name: value.grad for name, value in self.parameters.items() if value.grad is not None}
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in found.values()))
        scale = min(1.0, 1.0 / (norm + 1e-6))
        for name, grad in found.items():
            value = self.parameters[name]
            if name in self.matrices:
                update = self._muon(name, grad * scale)
                value.mul_(1 - learning_rate * WEIGHT_DECAY)
            else:
                update = self._adam(name, grad * scale, step)
            value.sub_(update, alpha=learning_rate)
            value.grad = None
        return norm

    def _muon(self, name: str, grad: Tensor) -> Tensor:
        first = self.state[f"{name}/first"]
        first.mul_(MOMENTUM).add_(grad)
        update = orthogonalise((grad + MOMENTUM * first).flatten(1))
        return (update * 0.2 * math.sqrt(max(update.shape))).view(grad.shape)

    def _adam(self, name: str, grad: Tensor, step: int) -> Tensor:
        first, second = self.state[f"{name}/first"], self.state[f"{name}/second"]
        first.lerp_(grad, 1 - BETAS[0])
        second.lerp_(grad.square(), 1 - BETAS[1])
        corrected = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(1e-8)
        return first / (1 - BETAS[0] ** (step + 1)) / corrected
