"""The Wan VAE as a differentiable function of whole clips, for training.

:class:`causal_forcing.vae.WanVae` streams with caches and runs under inference; training wants one call for a whole
clip. Both read the same state dict (the original Wan names), and a test holds them equal. Clips have ``1 + 4k`` frames.

Tensors are ``[B, C, T, H, W]`` in the channels-last memory format, which the CPU's conv3d runs at near peak when the
channel counts are multiples of 16 (measured: 55 to 60 GFLOP/s a core, against 25 to 50 for the folded conv2d). On a GPU
the frames under a kernel's taps become channels of one two-dimensional convolution instead, as in the streaming VAE.

Source of the graph: Wan-Video/Wan2.1 wan/modules/vae.py, as described in the model specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_forcing.config import VaeConfig

Kind = Literal["conv", "residual", "attention", "down2d", "down3d", "up2d", "up3d", "head", "pointwise"]
Parameters = Mapping[str, Tensor]

_NORM_EPS = 1e-12


@dataclass(frozen=True)
class Layer:
    """One layer of the encoder or decoder: what it is, its name in the state dict, channels in and out."""

    kind: Kind
    name: str
    inputs: int
    outputs: int


def encoder_layers(config: VaeConfig) -> list[Layer]:
    """Return the encoder's layers in order, the final pointwise convolution included."""
    widths = [config.base_dim * m for m in (1, *config.dim_mult)]
    layers = [Layer("conv", "encoder.conv1", 3, widths[0])]
    index = 0
    last = len(config.dim_mult) - 1
    for stage, (width, out) in enumerate(pairwise(widths)):
        for block in range(config.num_res_blocks):
            layers.append(Layer("residual", f"encoder.downsamples.{index}", width if block == 0 else out, out))
            index += 1
        if stage != last:
            kind: Kind = "down3d" if config.temporal_downsample[stage] else "down2d"
            layers.append(Layer(kind, f"encoder.downsamples.{index}", out, out))
            index += 1
    layers += _middle("encoder", widths[-1])
    layers.append(Layer("head", "encoder.head", widths[-1], 2 * config.z_dim))
    layers.append(Layer("pointwise", "conv1", 2 * config.z_dim, 2 * config.z_dim))
    return layers


def decoder_layers(config: VaeConfig) -> list[Layer]:
    """Return the decoder's layers in order, the first pointwise convolution included."""
    widths = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    layers = [Layer("pointwise", "conv2", config.z_dim, config.z_dim)]
    layers.append(Layer("conv", "decoder.conv1", config.z_dim, widths[0]))
    layers += _middle("decoder", widths[0])
    index = 0
    last = len(config.dim_mult) - 1
    temporal = tuple(reversed(config.temporal_downsample))
    for stage, (width, out) in enumerate(pairwise(widths)):
        entering = width if stage == 0 else width // 2
        for block in range(config.num_res_blocks + 1):
            layers.append(Layer("residual", f"decoder.upsamples.{index}", entering if block == 0 else out, out))
            index += 1
        if stage != last:
            kind: Kind = "up3d" if temporal[stage] else "up2d"
            layers.append(Layer(kind, f"decoder.upsamples.{index}", out, out // 2))
            index += 1
    layers.append(Layer("head", "decoder.head", widths[-1], 3))
    return layers


def _middle(part: str, width: int) -> list[Layer]:
    kinds: tuple[Kind, ...] = ("residual", "attention", "residual")
    return [Layer(kind, f"{part}.middle.{i}", width, width) for i, kind in enumerate(kinds)]


def parameter_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a Wan VAE of these sizes."""
    return dict(pair for layer in encoder_layers(config) + decoder_layers(config) for pair in _shapes(layer))


def _shapes(layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    name, cin, cout = layer.name, layer.inputs, layer.outputs

    def conv(suffix: str, inputs: int, outputs: int, *kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}{suffix}.weight", (outputs, inputs, *kernel)
        yield f"{name}{suffix}.bias", (outputs,)

    if layer.kind == "conv":
        yield from conv("", cin, cout, 3, 3, 3)
    elif layer.kind == "pointwise":
        yield from conv("", cin, cout, 1, 1, 1)
    elif layer.kind == "head":
        yield f"{name}.0.gamma", (cin, 1, 1, 1)
        yield from conv(".2", cin, cout, 3, 3, 3)
    elif layer.kind == "residual":
        yield f"{name}.residual.0.gamma", (cin, 1, 1, 1)
        yield from conv(".residual.2", cin, cout, 3, 3, 3)
        yield f"{name}.residual.3.gamma", (cout, 1, 1, 1)
        yield from conv(".residual.6", cout, cout, 3, 3, 3)
        if cin != cout:
            yield from conv(".shortcut", cin, cout, 1, 1, 1)
    elif layer.kind == "attention":
        yield f"{name}.norm.gamma", (cin, 1, 1)
        yield from conv(".to_qkv", cin, 3 * cin, 1, 1)
        yield from conv(".proj", cin, cin, 1, 1)
    else:
        yield from conv(".resample.1", cin, cout, 3, 3)
        if layer.kind in ("down3d", "up3d"):
            yield from conv(".time_conv", cin, cin * (2 if layer.kind == "up3d" else 1), 3, 1, 1)


def initial_parameters(config: VaeConfig, seed: int) -> dict[str, Tensor]:
    """Return seeded float32 parameters: He-normal weights, and residual branches that start as zero."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("gamma"):
            value = torch.ones(shape)
        elif name.endswith(("bias", "proj.weight")) or ".residual.6." in name:
            value = torch.zeros(shape)
        else:
            value = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        if "time_conv.weight" in name:
            value = _hold_time(shape)
        parameters[name] = value
    return parameters


def deepened(parameters: Parameters, config: VaeConfig, seed: int) -> dict[str, Tensor]:
    """Return the parameters of a VAE with more residual blocks that does the same as one with fewer.

    A new block begins as nothing, which a residual block can. Source: Net2Net, Chen et al. 2016 (arXiv 1511.05641).

    Args:
        parameters: Of a VAE of these sizes, or with fewer residual blocks.
        config: Sizes of the result.
        seed: Of the new blocks.

    Raises:
        ValueError: If they are of other sizes.
    """
    shallower = (replace(config, num_res_blocks=blocks) for blocks in range(1, config.num_res_blocks + 1))
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    before = next((sizes for sizes in shallower if parameter_shapes(sizes) == shapes), None)
    if before is None:
        raise ValueError(
            f"no VAE of width {config.base_dim} and {config.num_res_blocks} blocks or fewer has these sizes"
        )
    made = initial_parameters(config, seed)
    for layers in (encoder_layers, decoder_layers):
        old = layers(before)
        for layer in layers(config):
            if old and replace(old[0], name=layer.name) == layer:
                names = zip(_shapes(layer), _shapes(old.pop(0)), strict=True)
                made |= {new: parameters[name] for (new, _), (name, _) in names}
    return made


def _hold_time(shape: tuple[int, ...]) -> Tensor:
    """Return a temporal convolution that repeats (or keeps) the newest frame."""
    value = torch.zeros(shape)
    for output in range(shape[0]):
        value[output, output % shape[1], 2] = 1.0
    return value


def encode(parameters: Parameters, config: VaeConfig, video: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the latents of whole clips.

    Args:
        parameters: By original Wan name.
        config: Sizes the parameters have; its latent mean and std are not used here.
        video: ``[B, 3, 1 + 4k, H, W]`` float32 in [-1, 1].

    Returns:
        Two tensors ``[B, 16, 1 + k, H/8, W/8]``, not normalised.
    """
    x = video.contiguous(memory_format=torch.channels_last_3d)
    for layer in encoder_layers(config):
        x = _apply(parameters, layer, x)
    mean, log_variance = x.chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode(parameters: Parameters, config: VaeConfig, z: Tensor) -> Tensor:
    """Return whole clips ``[B, 3, 1 + 4k, H, W]``, not clamped, of latents ``[B, 16, 1 + k, h, w]``, not normalised."""
    x = z.contiguous(memory_format=torch.channels_last_3d)
    for layer in decoder_layers(config):
        x = _apply(parameters, layer, x)
    return x


def _apply(parameters: Parameters, layer: Layer, x: Tensor) -> Tensor:
    name = layer.name
    if layer.kind in ("conv", "pointwise"):
        return _conv(parameters, name, x)
    if layer.kind == "head":
        return _conv(parameters, f"{name}.2", F.silu(_norm(x, parameters[f"{name}.0.gamma"])))
    if layer.kind == "residual":
        return _residual(parameters, layer, x)
    if layer.kind == "attention":
        return _attention(parameters, name, x)
    if layer.kind in ("up2d", "up3d"):
        return _up(parameters, layer, x)
    return _down(parameters, layer, x)


def _norm(x: Tensor, gamma: Tensor) -> Tensor:
    if not _folds(x):
        rows = x.movedim(1, -1)
        return F.rms_norm(rows, rows.shape[-1:], gamma.flatten(), eps=_NORM_EPS).movedim(-1, 1)
    scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + _NORM_EPS)
    return x * scale.to(x.dtype) * gamma.view(1, -1, 1, 1, 1).to(x.dtype)


def _folds(x: Tensor) -> bool:
    """Return whether to convolve in two dimensions."""
    return x.is_cuda


def _as_frames(x: Tensor) -> Tensor:
    """Return clips ``[B, C, T, H, W]`` as images ``[B * T, C, H, W]``; a view in our memory format."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_clips(x: Tensor, batch: int) -> Tensor:
    """Return images as clips again."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def _conv_frames(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Return a convolution over time, without padding there, as one over images whose channels are all taps'.

    Args:
        x: ``[B, C, T, H, W]``.
        weight: ``[O, C, t, y, x]``.
        bias: ``[O]``.
        stride: Frames from one result to the next.
    """
    taps, results = weight.shape[2], (x.shape[2] - weight.shape[2]) // stride + 1
    parts = [x[:, :, tap : tap + stride * (results - 1) + 1 : stride] for tap in range(taps)]
    images = _as_frames(torch.cat(parts, dim=1) if taps > 1 else x)
    flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return _as_clips(F.conv2d(images, flat, bias, padding=weight.shape[3] // 2), x.shape[0])


def _conv(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    if weight.ndim == 4:
        weight = weight.unsqueeze(2)
    time, rows = weight.shape[2], weight.shape[3]
    if time > 1:
        x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
    if _folds(x):
        return _conv_frames(x, weight, bias)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, bias, padding=(0, rows // 2, rows // 2))


def _residual(parameters: Parameters, layer: Layer, x: Tensor) -> Tensor:
    name = f"{layer.name}.residual"
    y = _conv(parameters, f"{name}.2", F.silu(_norm(x, parameters[f"{name}.0.gamma"])))
    y = _conv(parameters, f"{name}.6", F.silu(_norm(y, parameters[f"{name}.3.gamma"])))
    if layer.inputs != layer.outputs:
        x = _conv(parameters, f"{layer.name}.shortcut", x)
    return x + y


def _attention(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    batch, channels, frames, height, width = x.shape
    qkv = _conv(parameters, f"{name}.to_qkv", _norm(x, parameters[f"{name}.norm.gamma"]))
    rows = qkv.permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, 3 * channels)
    q, k, v = rows.chunk(3, dim=-1)
    y = F.scaled_dot_product_attention(q, k, v)
    y = y.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
    return x + _conv(parameters, f"{name}.proj", y)


def _up(parameters: Parameters, layer: Layer, x: Tensor) -> Tensor:
    if layer.kind == "up3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], x[:, :, 1:]
        pairs = _conv(parameters, f"{layer.name}.time_conv", rest)
        even, odd = pairs.chunk(2, dim=1)
        doubled = torch.stack([even, odd], dim=3).flatten(2, 3)
        x = torch.cat([first, doubled], dim=2).contiguous(memory_format=torch.channels_last_3d)
    if _folds(x):
        doubled = F.interpolate(_as_frames(x), scale_factor=2, mode="nearest")
        return _conv(parameters, f"{layer.name}.resample.1", _as_clips(doubled, x.shape[0]))
    x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
    return _conv(parameters, f"{layer.name}.resample.1", x)


def _down(parameters: Parameters, layer: Layer, x: Tensor) -> Tensor:
    weight, bias = (parameters[f"{layer.name}.resample.1.{part}"] for part in ("weight", "bias"))
    x = F.pad(x, (0, 1, 0, 1))
    if _folds(x):
        flat = weight.contiguous(memory_format=torch.channels_last)
        x = _as_clips(F.conv2d(_as_frames(x), flat, bias, stride=2), x.shape[0])
    else:
        x = F.conv3d(x, weight.unsqueeze(2), bias, stride=(1, 2, 2))
    if layer.kind == "down3d" and x.shape[2] > 1:
        weight, bias = (parameters[f"{layer.name}.time_conv.{part}"] for part in ("weight", "bias"))
        pooled = _conv_frames(x, weight, bias, 2) if _folds(x) else F.conv3d(x, weight, bias, stride=(2, 1, 1))
        x = torch.cat([x[:, :, :1], pooled], dim=2)
    return x.contiguous(memory_format=torch.channels_last_3d)
