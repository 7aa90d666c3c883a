"""Skeleton of a model: its modules on torch's `meta` device, from config.json alone, and runs of it for shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.pruners.models.checkpoints.quiet import quiet
from secateur.pruners.models.discover import text_config


class ShapesOnly(TorchFunctionMode):
    """Mode in which tensors without memory answer questions about their values, so that a forward pass goes through.

    Whatever is asked is true, and every number 1: masks are those of texts without padding, and checks that two results
    agree succeed. Tokens are spread evenly over the experts of a mixture. Shapes are those of a real pass.

    Args:
        n_experts: that a mixture spreads tokens over.
    """

    def __init__(self, n_experts: int = 1) -> None:
        super().__init__()
        self._n_experts = n_experts

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func in _ANSWERS:
                return _ANSWERS[func]
            if func is Tensor.nonzero or func is torch.nonzero:
                return torch.empty(self._n_found(first), first.ndim, dtype=torch.long, device="meta")
            if (func is torch.where or func is Tensor.where) and len(args) == 1:
                return tuple(torch.empty(first.ndim, self._n_found(first), dtype=torch.long, device="meta"))
            if "grouped_mm" in getattr(func, "__name__", ""):  # whose shapes torch infers for bfloat16 alone
                return first.new_empty(first.shape[0], args[1].shape[-1])
            if func is Tensor.cpu:
                return first
            if func is Tensor.tolist:
                return torch.ones(first.shape).tolist()
        return func(*args, **(kwargs or {}))

    def _n_found(self, asked: Tensor) -> int:
        return -(-asked.numel() // self._n_experts)


_ANSWERS: dict[Callable[..., Any], Any] = {
    Tensor.__bool__: True,
    Tensor.__contains__: False,
    Tensor.item: 1,
    Tensor.__float__: 1.0,
    Tensor.__int__: 1,
    Tensor.__index__: 1,
    torch.allclose: True,
    torch.equal: True,
}
"""Answers in place of values."""


class Counted(ShapesOnly):
    """Mode that counts the bytes of tensors without memory that are alive, as a real pass would hold them.

    Storages count from the function that gave the first tensor on them until their last tensor is gone; what a
    function needs inside is not seen.

    Args:
        n_experts: see `ShapesOnly`.
    """

    def __init__(self, n_experts: int = 1) -> None:
        super().__init__(n_experts)
        self.now = 0
        self.most = 0
        self._known: set[int] = set()
        self._ignored: list[torch.UntypedStorage] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor)
        return found

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors, such as a model's weights."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known.add(id(storage))
            self._ignored.append(storage)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, n_bytes = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += n_bytes
        self.most = max(self.most, self.now)
        finalize(storage, self._gone, key, n_bytes)

    def _gone(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.now -= n_bytes


def skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a config, without memory, in evaluation mode; its parts are found within `ShapesOnly`."""
    with quiet(), torch.device("meta"):
        return _built(config, dtype, trust_remote_code).to("meta")  # some parameters are made elsewhere


MOST_TOKEN_IDS = 16_384
"""Vocabulary of a `miniature`: embedding and head of a whole one would take more memory than a streamed prune."""


def miniature(
    config: Any, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a config with its first block, at most `MOST_TOKEN_IDS` and random weights, to be timed."""
    config = copy.deepcopy(config)
    inner = text_config(config)
    if inner.vocab_size > MOST_TOKEN_IDS:
        inner.vocab_size = MOST_TOKEN_IDS
        inner.pad_token_id = None  # may be beyond; no row is special here
    n_blocks = inner.num_hidden_layers
    for key, value in vars(inner).items():
        if isinstance(value, list) and len(value) == n_blocks:
            setattr(inner, key, value[:1])
    inner.num_hidden_layers = 1
    with quiet(), torch.device("meta"):
        model = _built(config, dtype, trust_remote_code)
    model.to_empty(device=device)
    drawn = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            if x.is_floating_point():
                x.normal_(0, 0.02, generator=drawn)
            else:
                x.zero_()
    return model


def _built(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(
        config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return model.eval().requires_grad_(False)


def n_experts_of(config: Any) -> int:
    """Routed experts of a mixture, by the names that configs have for them; 1 of a model without."""
    inner = text_config(config)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return max(1, *(int(getattr(inner, name, None) or 1) for name in names))
