"""Operators of formulas on tensors. Undefined values are NaN or infinity, which `evaluate` refuses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def minmax(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """``(x - min) / (max - min)`` over the whole matrix; NaN for a constant."""
    least, greatest = x.aminmax()
    return (x - least) / (greatest - least)


def zscore(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """``(x - mean) / standard deviation`` over the whole matrix; NaN or infinity for a constant.

    The deviation is the population's, so that a vector gives what it gives when it is repeated for each row;
    Pruner-Zero takes the sample's.
    """
    if x.min() == x.max():
        return torch.full_like(x, torch.nan)  # the mean is rounded: the differences need not be zero
    return (x - x.mean()) / x.std(correction=0)


def rank(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Share of the whole matrix that is smaller, with equals counted half: within (0, 1)."""
    values = x.reshape(-1).contiguous()
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    return ((below + not_above).double() / (2 * values.numel())).to(x.dtype).reshape(x.shape)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs,
    "neg": torch.neg,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "log": torch.log,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "minmax": minmax,
    "zscore": zscore,
    "rank": rank,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "min": torch.minimum,
    "max": torch.maximum,
}
"""A function for each row of `spaces.formulas.operators.OPERATORS`."""
