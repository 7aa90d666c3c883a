"""Operators of formulas on tensors. Undefined values come out as NaN or infinity; `evaluate` refuses them.

The names are those of `secateur.spaces.formulas.operators`; a test holds the two tables together.
"""

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


OPERATIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "abs": (1, torch.abs),
    "neg": (1, torch.neg),
    "sqrt": (1, torch.sqrt),
    "square": (1, torch.square),
    "log": (1, torch.log),
    "exp": (1, torch.exp),
    "tanh": (1, torch.tanh),
    "minmax": (1, minmax),
    "zscore": (1, zscore),
    "rank": (1, rank),
    "add": (2, torch.add),
    "sub": (2, torch.sub),
    "mul": (2, torch.mul),
    "div": (2, torch.div),
    "pow": (2, torch.pow),
    "min": (2, torch.minimum),
    "max": (2, torch.maximum),
}
"""Number of arguments, and the function."""
