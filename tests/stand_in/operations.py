"""Operations of torch with a rule of their own: transfers, views of where a tensor is, factories, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tests.stand_in.labels import CPU, LABEL, put, where


class Mode(Protocol):
    """Interface of the mode that an operation runs in."""

    def asked(self, kwargs: dict[str, Any]) -> torch.device | None: ...
    def check(self, device: Any) -> torch.device: ...
    def transfer(self, tensor: Tensor, source: torch.device, target: torch.device) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *of: Any) -> Any: ...


def _to(mode: Mode, func: Any, args: Any, kwargs: Any) -> Any:
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


def _moved(mode: Mode, before: Tensor, found: Tensor, target: torch.device) -> Tensor:
    if where(before) == target:
        return put(found, target)
    mode.transfer(before, where(before), target)
    return put(found.clone() if found.data_ptr() == before.data_ptr() else found, target)


def _cpu(mode: Mode, func: Any, args: Any, kwargs: Any) -> Tensor:
    return _moved(mode, args[0], args[0], CPU)


def _cuda(mode: Mode, func: Any, args: Any, kwargs: Any) -> Tensor:
    return _moved(mode, args[0], args[0], mode.check(torch.device("cuda", args[1] if len(args) > 1 else 0)))


def _device(mode: Mode, func: Any, args: Any, kwargs: Any) -> torch.device:
    found = getattr(args[0], LABEL, None)
    return func(*args) if found is None else found  # of meta tensors their own


def _is_cuda(mode: Mode, func: Any, args: Any, kwargs: Any) -> bool:
    return where(args[0]).type == "cuda"


def _numpy(mode: Mode, func: Any, args: Any, kwargs: Any) -> Any:
    if where(args[0]) != CPU:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return func(*args, **kwargs)


def _set_data(mode: Mode, func: Any, args: Any, kwargs: Any) -> Any:
    """The tensor is where its new data are."""
    put(args[0], where(args[1]))
    return func(*args, **kwargs)


def _getter(mode: Mode, func: Any, args: Any, kwargs: Any) -> Any:
    found = func(*args, **kwargs)
    return put(found, where(args[0])) if isinstance(found, Tensor) else found


def _hooked(mode: Mode, func: Any, args: Any, kwargs: Any) -> Any:
    self, hook = args
    return func(self, lambda gradient: hook(put(gradient, where(self))))


def _tensor(mode: Mode, func: Any, args: Any, kwargs: Any) -> Any:
    device = mode.asked(kwargs)
    found = func(*args, **kwargs)
    if device is not None and device != CPU:
        mode.transfer(found, CPU, device)
    return put(found, CPU if device is None else device)


def _grad(mode: Mode, func: Any, args: Any, kwargs: Any) -> Any:
    found = func(*args, **kwargs)
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    return tuple(None if x is None else put(x, where(i)) for x, i in zip(found, inputs, strict=True))


def _backward(mode: Mode, func: Any, args: Any, kwargs: Any) -> Any:
    """With the mode on, which hooks need."""
    kwargs["grad_tensors"] = kwargs.pop("gradient", None)
    with mode:
        return torch.autograd.backward(args[0], **kwargs)


OPERATIONS: dict[Any, Callable[..., Any]] = {
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
