"""Counts what a piece of the engine does on the meta device: no clock, no GPU, real dimensions.

A meta tensor has sizes and no data, so whatever would make the host wait for a device (``item``, ``tolist``, ``bool``,
``nonzero``, ``cpu``, a boolean mask, ...) raises there by itself, in every grad mode: :func:`no_device_sync` only gives
those errors one name, and adds what meta tensors do not notice, copies to the device that wait.

Each meter is a dispatch mode. It sees every operator below the composite ones, with attention kept whole as the one
kernel that it is on a GPU.
"""

import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention.default
META = torch.device("meta")


class DeviceSync(AssertionError):
    """The host would have waited for the device."""


class Meter(TorchDispatchMode):
    """Shows every operator that would be a kernel (or a view) to :meth:`observe`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.scaled_dot_product_attention.default:
            with self:
                return ATTENTION(*args, **kwargs)[0]
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self.observe(func, args, kwargs, result)
        return result

    def observe(self, func, args, kwargs, result):
        raise AssertionError("a meter observes something")


class FlopMeter(Meter):
    """Floating-point operations of matrix products, convolutions and attention, by operator.

    Attributes:
        flops: By operator name.
        attended: Key rows that each attention call read, in order.
    """

    def __init__(self):
        super().__init__()
        self.flops = Counter()
        self.attended = []

    @property
    def total(self):
        return sum(self.flops.values())

    def observe(self, func, args, kwargs, result):
        if func._overloadpacket in flop_registry:
            self.flops[func._overloadpacket.__name__] += flop_registry[func._overloadpacket](
                *args, **kwargs, out_val=result
            )
        if func is ATTENTION:
            self.attended.append(args[1].shape[2])


class CacheMeter(Meter):
    """What happens to the rows of a key-value cache.

    Attributes:
        rows_written: Rows overwritten, summed over all its tensors.
        copies: Operators that copied or computed something from rows of the cache, attention aside, or that wrote to it
            without naming rows.
    """

    def __init__(self, cache):
        super().__init__()
        self.rows_written = 0
        self.copies = []
        self._storages = {_storage(t) for t in (*cache.keys, *cache.values)}

    def observe(self, func, args, kwargs, result):
        touched = [i for i, arg in enumerate(args) if self._holds(arg)]
        if not touched or (self._holds(result) and not func._schema.is_mutable):
            return  # other tensors, or a view
        if func is aten.index_copy_.default and touched == [0]:
            self.rows_written += args[2].numel()
        elif func is aten.copy_.default and touched == [0]:
            self.rows_written += args[0].shape[2]
        elif func is not ATTENTION or 0 in touched:
            self.copies.append(str(func))

    def _holds(self, value):
        return any(isinstance(leaf, Tensor) and _storage(leaf) in self._storages for leaf in tree_leaves(value))


class AllocationMeter(Meter):
    """Bytes of the tensors made while it is active and still alive.

    Attributes:
        live_bytes: Now.
        peak_bytes: The most so far.
    """

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known = {}

    def observe(self, func, args, kwargs, result):
        held_before = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, Tensor)
                and leaf.device == META
                and _storage(leaf) not in held_before | set(self._known)
            ):
                self._add(leaf.untyped_storage())

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._known[key] = weakref.ref(storage, lambda _: self._release(key, size))

    def _release(self, key, size):
        self.live_bytes -= size
        del self._known[key]


class _UploadMeter(Meter):
    """Raises on a copy from the host to the device that waits for it."""

    def observe(self, func, args, kwargs, result):
        if func in (aten._to_copy.default, aten.copy_.default) and not _non_blocking(func, args, kwargs):
            source = args[1] if func is aten.copy_.default else args[0]
            if source.device.type == "cpu" and result.device == META and source.ndim:
                raise DeviceSync(f"a copy to the device that waits: {func} of shape {tuple(source.shape)}")


class _ConstructionMeter(TorchFunctionMode):
    """Raises on host data made into a device tensor; ``torch.tensor`` copies below the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") not in (None, "cpu", torch.device("cpu")):
            raise DeviceSync(f"host data copied to the device: torch.{func.__name__}")
        return func(*args, **kwargs)


@contextmanager
def no_device_sync():
    """Raise :class:`DeviceSync` where the enclosed work on meta tensors would make the host wait for the device."""
    with ExitStack() as modes:
        modes.enter_context(_UploadMeter())
        modes.enter_context(_ConstructionMeter())
        try:
            yield
        except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
            if "meta" not in str(error).lower():
                raise
            raise DeviceSync(str(error)) from error


def _non_blocking(func, args, kwargs):
    return kwargs.get("non_blocking", args[2] if func is aten.copy_.default and len(args) > 2 else False)


def _storage(tensor):
    return tensor.untyped_storage()._cdata
