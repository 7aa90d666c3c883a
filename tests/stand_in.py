"""Stand-in for CUDA devices on a CPU: tensors that say they are on a GPU, and operations that refuse to mix devices.

A tensor "on" ``cuda:1`` is one in the host's memory with a label. Operations of torch that take tensors of different
devices raise, as on a GPU; what they compute is the CPU's, so that results can be compared bit for bit. Transfers and
waits are counted. What it can't see: operations that a kernel of CUDA lacks, rounding of its own, and real overlap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
_LABEL = "_stand_in_device"
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


class MixedDevicesError(RuntimeError):
    """Tensors of different devices in one operation."""


def where(tensor: Tensor) -> torch.device:
    """The device that a tensor says it is on."""
    found: torch.device = getattr(tensor, _LABEL, None) or CPU
    return found


def put(tensor: Any, device: torch.device) -> Any:
    """Label a tensor."""
    if isinstance(tensor, Tensor) and (device != CPU or hasattr(tensor, _LABEL)):
        object.__setattr__(tensor, _LABEL, device)
    return tensor


def _normal(device: Any) -> torch.device:
    found = torch.device(device)
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


@dataclass
class Events:
    """What happened between host and device.

    Args:
        waits: operations that waited for the device, by name.
        uploads, downloads: bytes from the host to a device, and back.
        moves: bytes from one device to another.
    """

    waits: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    downloads: int = 0
    moves: int = 0

    def clear(self) -> None:
        self.waits.clear()
        self.uploads = self.downloads = self.moves = 0


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
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        target = self._asked(kwargs)
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

    def _asked(self, kwargs: dict[str, Any]) -> torch.device | None:
        """The device of a factory's keyword, which is replaced by the CPU."""
        device = kwargs.get("device")
        if device is None:
            return None
        device = self.check(device)
        if device.type == "cuda":
            kwargs["device"] = CPU
        return device

    def check(self, device: Any) -> torch.device:
        found = _normal(device)
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


def _to(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
    self, *rest = args
    target, other = where(self), kwargs.pop("device", None)
    for value in rest[:1]:
        if isinstance(value, Tensor):
            target, rest = where(value), [value.dtype, *rest[1:]]
        elif not isinstance(value, torch.dtype):
            other = value
    if other is not None:
        target = mode.check(torch.device("cuda", other) if isinstance(other, int) else other)
    if target.type == "meta":
        return func(self, target, **kwargs)
    dtype = kwargs.get("dtype") or next((x for x in rest if isinstance(x, torch.dtype)), self.dtype)
    copied = kwargs.get("copy", False) or rest[-2:] == [False, True]
    return _moved(mode, self, func(self, dtype, copy=copied), target)


def _moved(mode: StandIn, before: Tensor, found: Tensor, target: torch.device) -> Tensor:
    if where(before) == target:
        return put(found, target)
    mode.transfer(before, where(before), target)
    return put(found.clone() if found.data_ptr() == before.data_ptr() else found, target)


def _cpu(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Tensor:
    return _moved(mode, args[0], args[0], CPU)


def _cuda(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Tensor:
    return _moved(mode, args[0], args[0], mode.check(torch.device("cuda", args[1] if len(args) > 1 else 0)))


def _device(mode: StandIn, func: Any, args: Any, kwargs: Any) -> torch.device:
    found = getattr(args[0], _LABEL, None)
    return func(*args) if found is None else found  # of meta tensors their own


def _is_cuda(mode: StandIn, func: Any, args: Any, kwargs: Any) -> bool:
    return where(args[0]).type == "cuda"


def _numpy(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
    if where(args[0]) != CPU:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return func(*args, **kwargs)


def _set_data(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
    """The tensor is where its new data are."""
    put(args[0], where(args[1]))
    return func(*args, **kwargs)


def _getter(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
    found = func(*args, **kwargs)
    return put(found, where(args[0])) if isinstance(found, Tensor) else found


def _hooked(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
    self, hook = args
    return func(self, lambda gradient: hook(put(gradient, where(self))))


def _tensor(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
    device = mode._asked(kwargs)
    found = func(*args, **kwargs)
    if device is not None and device != CPU:
        mode.transfer(found, CPU, device)
    return put(found, CPU if device is None else device)


def _grad(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
    found = func(*args, **kwargs)
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    return tuple(None if x is None else put(x, where(i)) for x, i in zip(found, inputs, strict=True))


def _backward(mode: StandIn, func: Any, args: Any, kwargs: Any) -> Any:
    """With the mode on, which hooks need."""
    kwargs["grad_tensors"] = kwargs.pop("gradient", None)
    with mode:
        return torch.autograd.backward(args[0], **kwargs)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
    Tensor.device.__get__: _device,
    Tensor.is_cuda.__get__: _is_cuda,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.data.__set__: _set_data,
    Tensor.data.__get__: _getter,
    Tensor.grad.__get__: _getter,
    Tensor.register_hook: _hooked,
    Tensor.pin_memory: lambda mode, func, args, kwargs: args[0],
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    torch.autograd.grad: _grad,
    Tensor.backward: _backward,
}


class _Generators(type(torch.Generator)):  # type: ignore[misc]
    """Type of `Generator`: annotations that were read while it stood in fit all generators."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Generator.__base__)


class Generator(torch.Generator, metaclass=_Generators):
    """Generator of random numbers on a device."""

    on = CPU

    def __new__(cls, device: Any = "cpu") -> Generator:
        made: Generator = super().__new__(cls, "cpu")
        made.on = _normal(device)
        return made


class Event:
    """Event of a stream; its time is the number of the call that recorded it."""

    log: ClassVar[list[str]] = []
    clock = 0.0

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        Event.clock += 1.0
        self.at = Event.clock
        Event.log.append("record")

    def wait(self, stream: Any = None) -> None:
        Event.log.append("wait for event")

    def synchronize(self) -> None:
        Event.log.append("synchronize event")

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Graph:
    """CUDA graph: keeps what was called while it was captured; a replay makes no call of Python."""

    def replay(self) -> None:
        Event.log.append("replay")


class Stream:
    """Stream of a device."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        Event.log.append("wait for stream")

    def wait_event(self, event: Any) -> None:
        Event.log.append("wait for event")

    def synchronize(self) -> None:
        Event.log.append("synchronize stream")


@contextmanager
def _capture(graph: Graph, **_: Any) -> Iterator[None]:
    Event.log.append("capture")
    yield
    Event.log.append("captured")


@dataclass
class Devices:
    """The stand-in devices of a test.

    Args:
        mode: active while the test runs.
        free: bytes that are free on each.
        total: bytes of each.
    """

    mode: StandIn
    free: list[int]
    total: int = 141 << 30

    @property
    def events(self) -> Events:
        return self.mode.events

    @property
    def log(self) -> list[str]:
        return Event.log


@contextmanager
def stand_in(n_devices: int = 1, free: int = 100 << 30) -> Iterator[Devices]:
    """Context with stand-in CUDA devices.

    Args:
        n_devices: how many.
        free: bytes that are free on each.
    """
    torch.compiler.disable(lambda: None)  # what it imports compares functions that are replaced here
    patch = pytest.MonkeyPatch()
    mode = StandIn(n_devices)
    devices = Devices(mode, [free] * n_devices)
    Event.log.clear()

    def index(device: Any = None) -> int:
        return (
            0 if device is None else mode.check(device).index or 0 if not isinstance(device, int) else device
        )

    def synchronize(device: Any = None) -> None:
        mode.events.waits["synchronize"] += 1
        Event.log.append("synchronize")

    replacements = {
        "is_available": lambda: True,
        "device_count": lambda: n_devices,
        "mem_get_info": lambda device=None: (devices.free[index(device)], devices.total),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": synchronize,
        "current_stream": lambda device=None: Stream(device),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "Stand-in",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="Stand-in", L2_cache_size=1 << 20, total_memory=devices.total, major=9, minor=0
        ),
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": _capture,
    }
    for name, value in replacements.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: Event.log.append("record stream"))
    make = torch.Tensor._make_subclass

    def make_subclass(cls: Any, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return put(make(cls, data, *args, **kwargs), where(data))

    patch.setattr(torch.Tensor, "_make_subclass", staticmethod(make_subclass))
    try:
        with mode:
            yield devices
    finally:
        patch.undo()


def devices_of(model: nn.Module) -> set[torch.device]:
    """Devices that the parameters of a model are on."""
    return {where(x) for x in model.parameters()}
