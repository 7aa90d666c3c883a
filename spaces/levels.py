"""Levels under a target: the rounding rule, the totals that meet a target, and moves of levels to meet it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from operator import getitem
from typing import Any

import numpy as np

Table = tuple[tuple[int, ...], ...]
"""Usage of each unit at each of its levels, ascending, in the target's integer unit (e.g. weights removed)."""

Sparsities = Sequence[float] | Mapping[int, Sequence[float]] | Mapping[str, Sequence[float]]
"""Sparsity of each level, ascending from 0: of all linears, or by a linear's number of weights, or by its name."""

REACH = 4
"""Levels on each side of a found one, as in Týr-the-Pruner's released code (arXiv 2503.09657): nine of them."""


def sparsities_of(levels: Sparsities, n_weights: int, name: str = "") -> Sequence[float]:
    """Sparsity of each level of a linear with so many weights and this name."""
    if not isinstance(levels, Mapping):
        return levels
    by_key: Mapping[Any, Sequence[float]] = levels
    return by_key[name if name in by_key else n_weights]


def levels_around(found: float, step: Fraction, max_sparsity: float) -> tuple[float, ...]:
    """Sparsities of one linear's levels: 0, and those up to `REACH` steps from a found one."""
    shares = [Fraction(str(found)) + k * step for k in range(-REACH, REACH + 1)]
    return (0.0, *(float(share) for share in shares if 0 < share <= Fraction(str(max(max_sparsity, found)))))


def levels_by_weights(
    n_weights: int, step: int, targets: Sequence[float], max_sparsity: float, around: int | None
) -> tuple[float, ...]:
    """Sparsities of one linear's levels that are a fixed number of weights apart.

    Levels of the database of EvoPress (arXiv 2410.14649): one at the lowest target, the others whole steps from it;
    and the dense level, which need not be.

    Args:
        n_weights: of the linear.
        step: weights between neighbouring levels.
        targets: sparsities, ascending.
        max_sparsity: of the highest level.
        around: levels below the lowest target and above the highest one; None: all there are.
    """
    start = n_zeros(targets[0], n_weights)
    below = (start - 1) // step
    above = (n_zeros(max_sparsity, n_weights) - start) // step
    if around is not None:
        further = -(-(n_zeros(targets[-1], n_weights) - start) // step)
        below, above = min(below, around), min(above, further + around)
    return (0.0, *((start + k * step) / n_weights for k in range(-below, above + 1)))


def check_ascending(name: str, values: Sequence[float]) -> None:
    """Check that there are values, all in [0, 1], strictly ascending."""
    bad = next((value for value in values if not 0 <= value <= 1), None)
    if bad is not None:
        raise ValueError(f"Expected `{name}` within [0, 1], got {bad:g}. It is a fraction.")
    if not values or list(values) != sorted(set(values)):
        raise ValueError(f"Expected `{name}` to be strictly ascending, got {list(values)}.")


def n_zeros(sparsity: float, n_weights: int) -> int:
    """Number of zeros at this sparsity: the one rounding rule, half up."""
    return math.floor(sparsity * n_weights + 0.5)


def rounded_share(share: float, total: int) -> int:
    """This share of a total, in exact decimal arithmetic, half up."""
    return math.floor(Fraction(str(share)) * total + Fraction(1, 2))


def total_usage(table: Table, levels: Sequence[int]) -> int:
    """Total usage of all units at these levels."""
    return sum(map(getitem, table, levels))


@dataclass(frozen=True)
class Window:
    """Totals that meet a target, both ends included."""

    low: int
    high: int

    def __contains__(self, total: int) -> bool:
        return self.low <= total <= self.high


def window(table: Table, target: float, n_weights: int, n_members: int, mean_step: float) -> Window:
    """Totals that meet a target.

    Exact up to the rounding of each linear if all level steps and the target are multiples of the smallest unit's
    step (as in most models). Otherwise up to one step of the smallest unit above the target, never below: no
    candidate gains by lower sparsity.

    Args:
        table: usage of each unit at each level.
        target: global sparsity in [0, 1].
        n_weights: number of weights of the target.
        n_members: number of linears, each of which is rounded.
        mean_step: one level step of the smallest unit, in weights, before rounding.
    """
    wanted = rounded_share(target, n_weights)
    slack = n_members // 2 + 1

    def is_multiple(usage: int, tolerance: int) -> bool:
        return abs(usage - round(usage / mean_step) * mean_step) <= tolerance

    steps = {high - low for row in table for low, high in pairwise(row)}
    if is_multiple(wanted, slack) and all(is_multiple(step, slack) for step in steps):
        return Window(wanted - slack, wanted + slack)
    smallest = min(table, key=lambda row: row[-1])
    step = max(high - low for low, high in pairwise(smallest))
    return Window(wanted - slack, wanted + max(slack, step))


def nearest_window(wanted: int, step: int) -> Window:
    """Totals within half a step of the wanted one; their number is `step`, so that moves by a step can't skip them."""
    return Window(wanted - step // 2, wanted + (step - 1) // 2)


def finest_step(table: Table) -> int:
    """Smallest, over the units, of a unit's largest step: this unit alone never skips a window of this size."""
    steps = [max(high - low for low, high in pairwise(row)) for row in table]
    return min(step for step in steps if step)


class Balance:
    """Moves of levels until their total is in a window.

    Each unit moves in one direction only, so that all sequences of moves end and a mutated unit is not moved back.

    Args:
        table: usage of each unit at each level.
        levels: to start from; copied.
        window: of the total.
        first: units before this one stay as they are.
    """

    def __init__(self, table: Table, levels: Sequence[int], window: Window, first: int = 0) -> None:
        self._table = table
        self.levels = list(levels)
        self._window = window
        self._total = total_usage(table, levels)
        self._moved = [0] * len(table)  # direction of each unit's moves, 0: none yet
        self._first = first

    @property
    def is_met(self) -> bool:
        return self._total in self._window

    def fresh(self, direction: int) -> list[int]:
        """Units without a move that can move by one level in this direction (1 or -1)."""
        return [unit for unit in range(self._first, len(self.levels)) if self._is_fresh(unit, direction)]

    def any_fresh(self, direction: int, rng: np.random.Generator) -> int | None:
        """A random unit of `fresh`, or None; usually without a scan of all units."""
        for unit in rng.integers(self._first, len(self.levels), size=8).tolist():
            if self._is_fresh(unit, direction):
                return int(unit)
        fresh = self.fresh(direction)
        return fresh[rng.integers(len(fresh))] if fresh else None

    def _is_fresh(self, unit: int, direction: int) -> bool:
        return not self._moved[unit] and 0 <= self.levels[unit] + direction < len(self._table[unit])

    def fits(self, unit: int) -> bool:
        """True if the unit can move up by one level within the window's upper end."""
        row, level = self._table[unit], self.levels[unit]
        return self._total + row[level + 1] - row[level] <= self._window.high

    def move(self, unit: int, direction: int) -> None:
        self.put(unit, self.levels[unit] + direction)

    def put(self, unit: int, level: int) -> None:
        before = self.levels[unit]
        self._total += self._table[unit][level] - self._table[unit][before]
        self.levels[unit] = level
        self._moved[unit] = (level > before) - (level < before)

    def settle(self, rng: np.random.Generator) -> bool:
        """Move units in random order until the total is in the window; False if that fails.

        A unit that closes the gap alone is preferred, then units that reduce it. If every move would overshoot the
        window, the smallest one is made and corrected by other units.
        """
        while not self.is_met:
            direction = 1 if self._total < self._window.low else -1
            changes = self._changes(direction)
            low, high = self._window.low - self._total, self._window.high - self._total
            closing = [unit for unit, change in changes if low <= change <= high]
            if closing:
                self.move(closing[rng.integers(len(closing))], direction)
            elif not self._approach(changes, direction, rng):
                if not changes:
                    return False
                smallest = min(abs(change) for _, change in changes)
                units = [unit for unit, change in changes if abs(change) == smallest]
                self.move(units[rng.integers(len(units))], direction)
        return True

    def _changes(self, direction: int) -> list[tuple[int, int]]:
        """Movable units, with the change of the total."""
        return [
            (unit, row[level + direction] - row[level])
            for unit, (row, level, moved) in enumerate(
                zip(self._table, self.levels, self._moved, strict=True)
            )
            if unit >= self._first and level != (len(row) - 1 if direction > 0 else 0) and moved != -direction
        ]

    def _approach(self, changes: Sequence[tuple[int, int]], direction: int, rng: np.random.Generator) -> bool:
        """Move units once, in random order, without overshooting; True if the total changed."""
        before = total = self._total
        low, high, levels, moved = self._window.low, self._window.high, self.levels, self._moved
        for index in rng.permutation(len(changes)).tolist():  # no calls: most of the time of a mutation
            unit, change = changes[index]
            if change and (low <= total + change if direction < 0 else total + change <= high):
                total += change
                levels[unit] += direction
                moved[unit] = direction
                if low <= total <= high:
                    break
        self._total = total
        return total != before


def spread_order(n: int) -> list[int]:
    """0 to n - 1 in an order with evenly spread prefixes (golden ratio, modulo 1)."""
    golden = (math.sqrt(5) - 1) / 2
    return sorted(range(n), key=lambda position: (position * golden) % 1)


def level_out(table: Table, window: Window) -> tuple[int, ...] | None:
    """The most uniform levels in the window: the highest common level, with evenly spread units one level higher.

    For units with the same levels. None if the window can't be met.
    """
    common = max(
        (x for x in range(len(table[0])) if sum(row[x] for row in table) <= window.high),
        default=0,
    )
    balance = Balance(table, [common] * len(table), window)
    for unit in spread_order(len(table)):
        if balance.is_met or common + 1 == len(table[0]):
            break
        if balance.fits(unit):
            balance.move(unit, 1)
    if balance.settle(np.random.default_rng(0)):
        return tuple(balance.levels)
    return None
