"""Multiple-choice knapsack: one option for each slot, smallest sum of losses, total usage within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MAX_STEPS = 200_000  # columns of the table of dynamic programming, for speed


class Knapsack:
    """Multiple-choice knapsack of known usages, to be solved for any losses.

    Args:
        usages: usage of each slot and option, >= 0, ascending.
        low: smallest total usage allowed.
        high: largest total usage allowed.
    """

    def __init__(self, usages: Sequence[Sequence[int]], low: int, high: int) -> None:
        self._usages, self._low, self._high = usages, low, high
        self._steps = equal_steps(usages, low, high)
        self._table = np.zeros((len(usages), max(map(len, usages))))
        for slot, row in enumerate(usages):
            self._table[slot, : len(row)] = row
        self._smallest = min((b - a for row in usages for a, b in pairwise(row) if b > a), default=1)

    def solve(self, losses: Sequence[Array]) -> list[int] | None:
        """The optimal choice: by dynamic programming if usages are multiples of one step, else by a MILP.

        Most options are excluded beforehand by their reduced costs, see `Dual`: an option whose reduced cost exceeds
        the gap between a choice and the dual bound is in no better choice. The problem is solved with the few others,
        and again with all that its result does not exclude.

        Args:
            losses: loss of each slot and option; infinite for forbidden options.

        Returns:
            Index of each slot's option, or None if no allowed choice is within the bounds.
        """
        if not all(np.isfinite(loss).any() for loss in losses):
            return None
        dual, n_all = self._dual(losses), sum(map(len, losses))
        gap = dual.usual_gap
        while True:
            kept = dual.options_within(gap)
            choice = self._among(losses, kept)
            found = math.inf
            if choice is not None:
                found = sum(float(loss[i]) for loss, i in zip(losses, choice, strict=True)) - dual.bound
            if found <= gap or sum(map(len, kept)) == n_all or math.isinf(gap):
                return choice
            gap = found if choice is not None else 4 * gap if 0 < gap < dual.largest_gap else math.inf

    def _among(self, losses: Sequence[Array], kept: Sequence[NDArray[np.int64]]) -> list[int] | None:
        """The optimal choice among the kept options."""
        some = [loss[row] for loss, row in zip(losses, kept, strict=True)]
        if self._steps is not None:
            rows = [[of[i] for i in row] for of, row in zip(self._steps[0], kept, strict=True)]
            total = self._steps[1] - sum(row[0] for row in rows)  # above each slot's smallest
            choice = by_table(some, [[n - row[0] for n in row] for row in rows], total)
        else:
            few = [[usage[i] for i in row] for usage, row in zip(self._usages, kept, strict=True)]
            choice = by_milp(some, few, self._low, self._high)
        return None if choice is None else [int(row[i]) for row, i in zip(kept, choice, strict=True)]

    def _dual(self, losses: Sequence[Array], n_halvings: int = 40) -> Dual:
        """The dual at the multiplier that bisection finds."""
        loss = np.full(self._table.shape, np.inf)
        for slot, row in enumerate(losses):
            loss[slot, : len(row)] = row
        finite = loss[np.isfinite(loss)]
        end = (finite.max() - finite.min()) / self._smallest + 1e-300
        below, above, slots = -end, end, np.arange(len(losses))
        for _ in range(n_halvings):
            middle = (below + above) / 2
            total = self._table[slots, np.argmin(loss - middle * self._table, axis=1)].sum()
            if self._low <= total <= self._high:
                below = above = middle
                break
            below, above = (middle, above) if total < self._low else (below, middle)
        multiplier = (below + above) / 2
        reduced = loss - multiplier * self._table
        least = reduced.min(axis=1)
        bound = least.sum() + multiplier * (self._low if multiplier >= 0 else self._high)
        return Dual(float(bound), reduced - least[:, None])


@dataclass(frozen=True)
class Dual:
    """Lagrangian dual of the knapsack: a bound, and by how much each option is above it.

    For any multiplier m, the losses minus m times the usages have a minimum in each slot. The sum of these minima, plus
    m times the bound of the total usage, is at most the loss of any allowed choice; a choice exceeds it by the sum of
    its options' reduced costs, or more (Fisher, https://doi.org/10.1287/mnsc.27.1.1).

    Args:
        bound: at most the loss of any allowed choice.
        excess: (slots, options) reduced costs, >= 0; infinite where there is no option, or a forbidden one.
    """

    bound: float
    excess: Array

    @property
    def usual_gap(self) -> float:
        """A gap that leaves two or three options in most slots."""
        second = np.sort(self.excess, axis=1)[:, 1:3]
        finite = second[np.isfinite(second)]
        return float(np.median(finite)) if finite.size else 0.0

    @property
    def largest_gap(self) -> float:
        """The largest finite reduced cost, beyond which nothing is excluded."""
        return float(self.excess[np.isfinite(self.excess)].max(initial=0.0))

    def options_within(self, gap: float) -> list[NDArray[np.int64]]:
        """Options that a choice with at most this gap can contain, ascending; up to rounding."""
        limit = gap + 1e-9 * (abs(self.bound) + gap) if math.isfinite(gap) else math.inf
        return [np.flatnonzero(row <= limit) for row in self.excess]


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
    if total < 0:
        return None
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
