"""Numbers of removed units of each layer, from shares or an order of units, that meet the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.pruners.recipes.allocation.layers import BudgetError, Floats, Ints, Layer
from secateur.spaces.levels import n_zeros, spread_order

Times = Sequence[NDArray[np.floating[Any]]]
"""Times at which the units of each layer are removed, ascending."""


def wanted_weights(layers: Sequence[Layer], sparsity: float) -> int:
    """Number of weights of the layers that the sparsity removes."""
    return n_zeros(sparsity, sum(layer.n_weights for layer in layers))


def check_reach(able: Sequence[Layer], wanted: int, layers: Sequence[Layer]) -> None:
    """Raise a BudgetError unless enough may be removed, to within half of the smallest unit, and some at all.

    Args:
        able: the layers that the rule may take from.

    Raises:
        BudgetError: if it is less.
    """
    most = sum(layer.removed(layer.n_free) for layer in able)
    if 2 * (wanted - most) > min(layer.size for layer in layers) or (wanted and not most):
        total = sum(layer.n_weights for layer in layers)
        raise BudgetError(
            f"Expected `sparsity` <= {most / total:.4f}, all that the rule may remove, got {wanted / total:.4f}. "
            "Lower it, protect less, or take another rule."
        )


def offsets(layers: Sequence[Layer]) -> Floats:
    """A number in (0, 1) for each layer; those of one kind are spread evenly over the depth.

    A share of 0.2 of 3 groups is 0.6 groups: rounded alike everywhere it would be 0 or 1 in all blocks. With these as
    thresholds of rounding up, in place of one half, 6 blocks out of 10 lose a group.
    """
    found = np.zeros(len(layers))
    for kind in ("attention", "mlp"):
        same = [index for index, layer in enumerate(layers) if layer.kind == kind]
        for rank, position in enumerate(spread_order(len(same))):
            found[same[position]] = (rank + 0.5) / len(same)
    return found


def in_order(layers: Sequence[Layer], times: Times, wanted: int, start: Ints | None = None) -> Ints:
    """Remove units in order, except for those that would exceed the budget.

    At the end one of the smallest that are left is removed, if that is nearer to the budget. Units of equal times are
    removed at an even pace in all layers: equal scores give equal shares.

    Args:
        times: of the units behind `start`, in their order of removal; no more than are free.
        start: units of each layer that are removed before; None: none.

    Returns:
        Removed units of each layer.
    """
    gone = np.zeros(len(layers), np.int64) if start is None else start.copy()
    left = wanted - sum(layer.removed(n) for layer, n in zip(layers, gone.tolist(), strict=True))
    owner, sizes, queue = _queue(layers, times, gone)
    late = queue[:0]
    while queue.size:
        passed = np.cumsum(sizes[queue])
        n = int(np.searchsorted(passed, left, side="right"))
        np.add.at(gone, owner[queue[:n]], 1)
        left -= int(passed[n - 1]) if n else 0
        fits = sizes[queue[n:]] <= left
        queue, late = queue[n:][fits], np.concatenate([late, queue[n:][~fits]])
    if late.size:
        last = late[np.argmin(sizes[late])]
        gone[owner[last]] += 2 * left >= sizes[last]
    return gone


def _queue(layers: Sequence[Layer], times: Times, start: Ints) -> tuple[Ints, Ints, Ints]:
    """Layer and weights of each removable unit; then the units in the order of removal."""
    lengths = [len(row) for row in times]
    owner = np.repeat(np.arange(len(layers)), lengths)
    index = np.concatenate([np.arange(n, n + length) for n, length in zip(start, lengths, strict=True)])
    n_units = np.array([layer.n_units for layer in layers])[owner]
    rest = np.array([layer.rest for layer in layers])[owner]
    sizes = np.array([layer.size for layer in layers])[owner] + np.where(index + 1 == n_units, rest, 0)
    even = (index + offsets(layers)[owner]) / n_units
    return owner, sizes, np.lexsort((even, np.concatenate(times)))


def pace(layer: Layer) -> float:
    """Weights that a share of the layer removes, over the share."""
    return layer.removed(layer.n_free) / max(layer.n_free, 1) * layer.n_units


def meet(layers: Sequence[Layer], shares: Floats, wanted: int) -> Floats:
    """The shares times one factor, each limited to the removable share of its layer, that remove the wanted weights.

    Raises:
        BudgetError: if there is no such factor, as shares below 1e-9 remain 0.
    """
    shares = np.where(shares < 1e-9, 0.0, shares)
    limits = np.array([layer.n_free / layer.n_units for layer in layers])
    weights = np.array([pace(layer) for layer in layers])
    check_reach([layer for layer, share in zip(layers, shares, strict=True) if share > 0], wanted, layers)
    low, high = 0.0, float(np.max(limits / np.where(shares > 0, shares, np.inf)))
    for _ in range(100):
        middle = (low + high) / 2
        if np.minimum(middle * shares, limits) @ weights < wanted:
            low = middle
        else:
            high = middle
    met: Floats = np.minimum(high * shares, limits)
    return met


def settle(layers: Sequence[Layer], shares: Floats, wanted: int) -> Ints:
    """Whole units nearest to the shares that meet the budget together.

    Args:
        shares: of each layer; they meet the budget but for rounding.
    """
    sizes = [layer.size for layer in layers]
    reach = 2 + -(-max(sizes) // min(sizes))  # units that others may have to make up for
    wished = shares * [layer.n_units for layer in layers]
    free = np.array([layer.n_free for layer in layers]) * (shares > 0)
    start = np.clip(wished.astype(np.int64) - reach, 0, free)
    stop = np.clip(wished.astype(np.int64) + reach, 0, free)
    ends = np.where(shares > 0, wished, 1.0)
    times = [(np.arange(a, b) + x) / y for a, b, x, y in zip(start, stop, offsets(layers), ends, strict=True)]
    return in_order(layers, times, wanted, start)


def relative_to_largest(centred: Floats) -> Floats:
    """The values over the largest absolute one; 0 where all are equal but for rounding."""
    largest = float(np.abs(centred).max())
    return centred / largest if largest > 1e-12 else np.zeros_like(centred)


def over_range(layers: Sequence[Layer], importance: Sequence[float], sparsity: float, half: float) -> Floats:
    """Shares to remove: kept ones grow linearly with the importance, over a range of twice `half`.

    Their mean, by weights, is the sparsity, but for shares that would be below 0 or above 1; equal importances give
    equal shares.
    """
    values = np.array(importance, np.float64)
    weights = [layer.n_weights for layer in layers]
    width = float(np.ptp(values))
    place = (values - values.min()) / width if width > 1e-12 else np.zeros_like(values)
    kept = 2 * half * (place - np.average(place, weights=weights)) + 1 - sparsity
    return np.clip(1 - kept, 0.0, 1.0)


def to_budget(layers: Sequence[Layer], shares: Sequence[float] | Floats, sparsity: float) -> Ints:
    """Numbers of removed units nearest to the shares, which are all scaled where they miss the budget."""
    wanted = wanted_weights(layers, sparsity)
    return settle(layers, meet(layers, np.asarray(shares, np.float64), wanted), wanted)
