"""Multiple-choice knapsack: one option for each slot, smallest sum of losses, total usage within bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MAX_STEPS = 200_000  # columns of the table of dynamic programming, for speed


def solve_knapsack(
    losses: Sequence[Array], usages: Sequence[Sequence[int]], low: int, high: int
) -> list[int] | None:
    """The optimal choice: by dynamic programming if usages are multiples of one step, else by a MILP.

    Args:
        losses: loss of each slot and option; infinite for forbidden options.
        usages: usage of each slot and option, >= 0, ascending.
        low: smallest total usage allowed.
        high: largest total usage allowed.

    Returns:
        Index of each slot's option, or None if no allowed choice is within the bounds.
    """
    steps = equal_steps(usages, low, high)
    if steps is not None:
        return by_table(losses, *steps)
    return by_milp(losses, usages, low, high)


def equal_steps(usages: Sequence[Sequence[int]], low: int, high: int) -> tuple[list[list[int]], int] | None:
    """Usages as multiples of one step, with their required total, if the problem is equivalent.

    It is if, in spite of rounding, exactly the choices with this total are within the bounds.
    """
    center = (low + high) / 2
    smallest = min((usage for usage in usages if usage[-1] > 0), key=lambda usage: usage[-1], default=None)
    if smallest is None:
        return None
    total = round(center / (smallest[-1] / (len(smallest) - 1)))
    if not 0 < total <= MAX_STEPS:
        return None
    step = center / total
    steps = [[round(x / step) for x in usage] for usage in usages]
    error = sum(
        max(abs(x - n * step) for x, n in zip(usage, row, strict=True))
        for usage, row in zip(usages, steps, strict=True)
    )
    half = (high - low) / 2
    return (steps, total) if error <= half and half + error < step else None


def by_table(losses: Sequence[Array], steps: Sequence[Sequence[int]], total: int) -> list[int] | None:
    """The optimal choice with this total of steps, by dynamic programming over slots and sums."""
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    chosen = np.zeros((len(losses), total + 1), dtype=np.int16)
    for slot, (loss, row) in enumerate(zip(losses, steps, strict=True)):
        reached = np.full(total + 1, np.inf)
        for index, n in enumerate(row):
            if n <= total:
                sums = best[: total + 1 - n] + loss[index]
                better = sums < reached[n:]
                reached[n:][better] = sums[better]
                chosen[slot, n:][better] = index
        best = reached
    if not np.isfinite(best[total]):
        return None
    choice = []
    for slot in range(len(losses) - 1, -1, -1):
        choice.append(int(chosen[slot, total]))
        total -= steps[slot][choice[-1]]
    return choice[::-1]


def by_milp(
    losses: Sequence[Array], usages: Sequence[Sequence[int]], low: int, high: int
) -> list[int] | None:
    """The optimal choice by branch and bound (HiGHS), to a relative gap of 1e-4."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # see `separable`
    from scipy.sparse import csr_array

    cost, usage = np.concatenate(losses), np.concatenate([np.asarray(u, dtype=float) for u in usages])
    slots = np.repeat(np.arange(len(losses)), [len(loss) for loss in losses])
    columns = np.arange(len(cost))
    allowed = np.isfinite(cost)
    unit = usage[usage > 0].min(initial=usage.max()) or 1.0
    scale = np.abs(cost[allowed]).max(initial=0.0) or 1.0
    one_each = csr_array((np.ones(len(cost)), (slots, columns)))
    total = csr_array((usage / unit, (np.zeros(len(cost), dtype=np.int64), columns)))
    result = milp(
        np.where(allowed, cost, 0.0) / scale,
        integrality=np.ones(len(cost), dtype=np.int64),
        bounds=Bounds(0, allowed.astype(float)),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(total, low / unit, high / unit)],
        options={"mip_rel_gap": 1e-4},
    )
    if result.x is None:
        return None
    return [int(np.argmax(result.x[slots == slot])) for slot in range(len(losses))]
