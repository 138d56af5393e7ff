"""What a VAE allocates while it works, counted on the meta device: true sizes, no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from causal_forcing.config import TinyVaeConfig, VaeConfig
from causal_forcing.geometry import TEMPORAL_STRIDE, Geometry, pixel_frames
from causal_forcing.vae import TinyVae, WanVae
from causal_forcing.weights.loading import build_vae

_META = torch.device("meta")
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_FRAME_COPIES = 3
"""Times that :meth:`StreamingVae.decode` holds its frames at its end: as parts, joined, and in their final order."""


@lru_cache(maxsize=64)
def decoding_bytes(sizes: VaeConfig | TinyVaeConfig, geometry: Geometry, dtype: torch.dtype, latent_frames: int) -> int:
    """Return what one call of a decoder allocates at most, beside weights and state; its pixels are part of it.

    Args:
        sizes: Of the VAE.
        geometry: Of the frames.
        dtype: Of the weights.
        latent_frames: Latent frames of the call.
    """
    vae = _build(sizes, dtype)
    state = vae.new_decoder_state(geometry)
    state.frames = 1  # the first latent frame of a scene is one pixel frame, and takes less
    latent = torch.empty(geometry.latent_shape(1), dtype=dtype, device=_META)
    meter = _Meter()
    with torch.inference_mode(), meter:
        vae.decode(latent, state)
    pixels = TEMPORAL_STRIDE * geometry.height * geometry.width * 3 * torch.float32.itemsize
    return max(meter.peak_bytes + (latent_frames - 1) * pixels, _FRAME_COPIES * latent_frames * pixels)


@lru_cache(maxsize=64)
def encoding_bytes(sizes: VaeConfig | TinyVaeConfig, geometry: Geometry, dtype: torch.dtype, latent_frames: int) -> int:
    """Return what one call of an encoder allocates at most, beside weights; its state and its input are part of it.

    Args:
        sizes: Of the VAE.
        geometry: Of the frames.
        dtype: Of weights and input.
        latent_frames: Latent frames of a scene's beginning that come of it.
    """
    vae = _build(sizes, dtype)
    state = vae.new_encoder_state(geometry)
    state.frames = int(latent_frames > 1)
    frame = torch.empty((1, 3, 1, geometry.height, geometry.width), dtype=dtype, device=_META)
    group = frame.expand(-1, -1, TEMPORAL_STRIDE if state.frames else 1, -1, -1)
    meter = _Meter()
    with torch.inference_mode(), meter:
        latent = vae.encode(group, state)
    given = frame.nbytes * pixel_frames(latent_frames, first=True)
    kept = (latent_frames + 1) * latent.nbytes  # the latents before, and the last one's mean and variance
    return state.nbytes + given + meter.peak_bytes + kept


def _build(sizes: VaeConfig | TinyVaeConfig, dtype: torch.dtype) -> WanVae | TinyVae:
    return build_vae(sizes)[0].to(dtype).requires_grad_(False)


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make and that are still alive.

    Attributes:
        peak_bytes: The most at a time so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operator and count what it made; attention as the one kernel that it is on a device."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        result = torch.empty_like(first) if func is _ATTENTION and first is not None else func(*args, **(kwargs or {}))
        given = None if first is None else first.untyped_storage()._cdata
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata != given:  # neither a view nor in place
                self._add(made.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.remove(key)
        self._live_bytes -= size
