"""Numbers about clips that need no reading: confidence intervals, optical flow, flicker; and the contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FLOW_LEVELS = 3
FLOW_ITERATIONS = 3
FLOW_WINDOW = 7
FLOW_DAMPING = 1e-3
SHEET_COLUMNS = 12


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    denominator = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / denominator
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / denominator
    return max(0.0, centre - spread), min(1.0, centre + spread)


def mean_flow(frames: NDArray[np.uint8]) -> float:
    """Return the mean length of the optical flow between successive frames, in pixels: the dynamic degree.

    Coarse-to-fine Lucas-Kanade over windows of 7 pixels; where there is no texture the flow is zero.

    Args:
        frames: ``[T, H, W, 3]`` uint8, at least two.

    Source: Lucas and Kanade 1981; coarse to fine as in Bouguet 2001.
    """
    grey = torch.from_numpy((frames / 255).mean(-1).astype(np.float32))[:, None]
    flow = torch.zeros(len(grey) - 1, 2, *(side >> (FLOW_LEVELS - 1) for side in grey.shape[2:]))
    for level in reversed(range(FLOW_LEVELS)):
        image = F.avg_pool2d(grey, 1 << level) if level else grey
        if flow.shape[2:] != image.shape[2:]:
            flow = 2 * F.interpolate(flow, size=image.shape[2:], mode="bilinear", align_corners=False)
        for _ in range(FLOW_ITERATIONS):
            flow = flow + _flow_step(image[:-1], _warp(image[1:], flow))
    return float(flow.norm(dim=1).mean())


def _flow_step(first: Tensor, second: Tensor) -> Tensor:
    """Return the Lucas-Kanade update ``[N, 2, H, W]`` (column, row) that moves ``first`` to ``second``."""
    padded = F.pad(first, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    dt = second - first
    parts = torch.cat([dx * dx, dx * dy, dy * dy, dx * dt, dy * dt], dim=1)
    xx, xy, yy, xt, yt = F.avg_pool2d(parts, FLOW_WINDOW, 1, FLOW_WINDOW // 2).unbind(1)
    xx, yy = xx + FLOW_DAMPING, yy + FLOW_DAMPING
    determinant = xx * yy - xy * xy
    step = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / determinant[:, None]
    return step.clamp(-2, 2)


def _warp(image: Tensor, flow: Tensor) -> Tensor:
    height, width = image.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = (columns + flow[:, 0]) * 2 / (width - 1) - 1
    y = (rows + flow[:, 1]) * 2 / (height - 1) - 1
    return F.grid_sample(image, torch.stack([x, y], dim=-1), padding_mode="border", align_corners=True)


def flicker(frames: NDArray[np.uint8]) -> float:
    """Return the mean absolute second difference over time (0 to 1): what changes and changes back.

    Args:
        frames: ``[T, H, W, 3]`` uint8, at least three.
    """
    values = frames.astype(np.float32) / 255
    return float(np.abs(values[2:] - 2 * values[1:-1] + values[:-2]).mean())


def write_sheet(path: Path, clips: Sequence[NDArray[np.uint8]]) -> None:
    """Write a contact sheet: a row a clip, its frames from left to right.

    Args:
        path: PNG to write; its folder is created.
        clips: Each ``[T, H, W, 3]`` uint8, thinned to 12 frames.
    """
    from PIL import Image

    rows = []
    for clip in clips:
        chosen = np.linspace(0, len(clip) - 1, SHEET_COLUMNS).round().astype(int)
        rows.append(np.concatenate(list(clip[chosen]), axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
