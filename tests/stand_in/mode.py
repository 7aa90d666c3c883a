"""Mode of torch in which devices ``cuda:0`` and further ones are there, and operations refuse to mix them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.stand_in.labels import CPU, Events, MixedDevicesError, normal, put, where
from tests.stand_in.operations import OPERATIONS

READS = {
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.item,
    Tensor.tolist,
    torch.equal,
    torch.allclose,
    torch.nonzero,
    Tensor.nonzero,
    torch.unique,
    Tensor.unique,
    torch.masked_select,
    Tensor.masked_select,
    torch.argwhere,
}
"""Operations that wait for the device, since their result is on the host or its shape depends on values."""
_METADATA = {torch._has_compatible_shallow_copy_type, torch.is_same_size, Tensor.is_set_to}
_FROM_ANY = {Tensor.copy_, Tensor.type_as, Tensor.data.__set__, Tensor.grad.__set__, Tensor.set_}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_MODE_OFF = torch._C.DisableTorchFunction


class StandIn(TorchFunctionMode):
    """Mode in which devices ``cuda:0`` to ``cuda:n-1`` are there.

    Args:
        n_devices: that there are.
    """

    def __init__(self, n_devices: int = 1) -> None:
        super().__init__()
        self.n_devices = n_devices
        self.events = Events()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _METADATA:
            return func(*args, **kwargs)
        special = OPERATIONS.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        target = self.asked(kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = self._common(func, args, tensors) if target is None else target
        if device != CPU and func in READS:
            self.events.waits[func.__name__] += 1
        if func in _INDEXING and device != CPU:
            index = tree_leaves(args[1])
            if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in index):
                self.events.waits["index by mask"] += 1
        found = func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "on", CPU) != device:
            raise MixedDevicesError(
                f"{func.__name__}: generator on another device than the tensor's, {device}"
            )
        return tree_map(lambda x: put(x, device), found) if _has_tensors(found) else found

    def asked(self, kwargs: dict[str, Any]) -> torch.device | None:
        """The device of a factory's keyword, which is replaced by the CPU."""
        device = kwargs.get("device")
        if device is None:
            return None
        device = self.check(device)
        if device.type == "cuda":
            kwargs["device"] = CPU
        return device

    def check(self, device: Any) -> torch.device:
        found = normal(device)
        if found.type == "cuda" and (found.index or 0) >= self.n_devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return found

    def _common(self, func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
        if not tensors:
            return CPU
        devices = {where(x) for x in tensors}
        if len(devices) == 1:
            return devices.pop()
        name = getattr(func, "__name__", str(func))
        first = where(tensors[0])
        if func in _FROM_ANY:
            self.transfer(tensors[1], where(tensors[1]), first)
            return first
        if func in _INDEXING:
            return self._index(func, args, first)
        others = {where(x) for x in tensors if x.ndim}
        others |= {where(x) for x in tensors if not x.ndim and where(x) != CPU}
        if len(others) > 1:
            shapes = [(tuple(x.shape), str(where(x))) for x in tensors]
            raise MixedDevicesError(f"{name}: Expected all tensors to be on the same device, got {shapes}")
        return others.pop()

    def _index(self, func: Any, args: Any, device: torch.device) -> torch.device:
        """Indices may be the host's; values of an assignment by slices are copied."""
        index = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        if any(where(x) not in (CPU, device) for x in index):
            raise MixedDevicesError(f"{func.__name__}: index on {[where(x) for x in index]} of {device}")
        for x in index:
            if where(x) != device:
                self.transfer(x, where(x), device)
        if len(args) > 2 and isinstance(args[2], Tensor) and where(args[2]) != device:
            if index and args[2].ndim:
                raise MixedDevicesError(f"{func.__name__}: values on {where(args[2])} for {device}")
            self.transfer(args[2], where(args[2]), device)
        return device

    def transfer(self, tensor: Tensor, source: torch.device, target: torch.device) -> None:
        """Count a copy."""
        if source == target:
            return
        with _MODE_OFF():
            n_bytes = tensor.numel() * tensor.element_size()
        if source == CPU:
            self.events.uploads += n_bytes
        elif target == CPU:
            self.events.downloads += n_bytes
            self.events.waits["copy to host"] += 1
        else:
            self.events.moves += n_bytes


def _has_tensors(found: Any) -> bool:
    return isinstance(found, (Tensor, tuple, list, dict)) and any(
        isinstance(x, Tensor) for x in tree_leaves(found)
    )
