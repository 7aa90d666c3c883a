"""Features of candidates for a model of their log-loss: the foretold loss of each slot, and deviations from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.search.controllers.knapsack import Array
from secateur.search.controllers.separable import removed_energy
from secateur.spaces.space import SeparableSpace

Positions = NDArray[np.int64]
"""Position of each slot's option, by candidate and slot."""

SLOPE, FREE, PAIR = 0.3, 0.3, 0.1  # prior deviations relative to that of a slot's share
REACH = 2  # slots this near to each other have a pair term


def smooth_table(space: SeparableSpace[Any]) -> list[Array]:
    """Losses of slots and options from an assumption alone, in proportion to the usage of the whole slot.

    Convex in the share that is removed, see `removed_energy`: with it the best candidate is about the uniform one.
    """
    table = []
    for slot in range(len(space.slots)):
        options = space.options(slot)
        shares = np.array([space.share(slot, option) for option in options])
        whole = space.usage(slot, options[-1]) / shares[-1] if shares[-1] else 0.0
        table.append(whole * removed_energy(shares))
    return table


class Features:
    """Linear features of candidates of one target, and the slot losses that weights of them stand for.

    The log-loss is modelled as a constant, plus the foretold loss of each slot in units of the whole, times a common
    factor; plus for each slot a factor of its own and a change of its slope; plus products of neighbouring slots; plus
    one weight for each option of slots that do not count towards the target.

    Args:
        space: of the candidates.
        table: foretold loss by slot and option, up to a constant a slot; infinite for forbidden options.
        whole: foretold loss of the whole candidate at `center`, > 0, in the unit of the table.
        center: positions of a typical good candidate.
    """

    def __init__(
        self, space: SeparableSpace[Any], table: Sequence[Array], whole: float, center: Sequence[int]
    ) -> None:
        n, width = len(space.slots), max(map(len, table))
        self._lengths = [len(row) for row in table]
        self._slots = np.arange(n)
        losses, shares = np.zeros((n, width)), np.zeros((n, width))
        for slot, row in enumerate(table):
            options = space.options(slot)
            finite = np.where(np.isfinite(row), row, row[np.isfinite(row)].max(initial=0.0))
            losses[slot, : len(row)] = (finite - finite[0]) / whole
            shares[slot, : len(row)] = [space.share(slot, option) for option in options]
        self.forbidden = [~np.isfinite(row) for row in table]
        self._losses = losses
        self._slopes = losses * (shares - shares[self._slots, list(center)][:, None]) / 0.3
        used = [bool(space.usage(slot, space.options(slot)[-1])) for slot in range(n)]
        self._free = [(slot, i) for slot in range(n) if not used[slot] for i in range(self._lengths[slot])]
        self._used = np.array(used, dtype=bool)
        at = np.maximum(losses[self._slots, list(center)], 1e-3 / n)
        pairs = [(a, a + k) for k in range(1, REACH + 1) for a in range(n - k) if used[a] and used[a + k]]
        self._first, self._second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        self._pair_scale = 1 / np.sqrt(at[self._first] * at[self._second])
        self.n = 1 + 2 * n + len(self._free) + len(pairs)

    @property
    def prior(self) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Prior mean and deviation of each weight, and whether the deviation has the common factor."""
        n, rest = len(self._slots), len(self._free)
        n_pairs = self.n - 1 - 2 * n - rest
        sizes = (1, n, n, rest, n_pairs)
        deviation = np.repeat([1.0, 1.0, SLOPE, FREE, PAIR], sizes)
        mean = np.zeros(self.n)
        mean[0] = 1.0
        return mean, deviation, np.arange(self.n) > 0

    def of(self, positions: Positions) -> Array:
        """Features, ``(candidates, n)``."""
        losses = self._losses[self._slots, positions]
        slopes = self._slopes[self._slots, positions]
        free = [positions[:, slot] == index for slot, index in self._free]
        pairs = losses[:, self._first] * losses[:, self._second] * self._pair_scale
        return np.column_stack([losses.sum(axis=1), losses, slopes, *free, pairs])

    def slot_losses(self, weights: Array, at: Sequence[int]) -> list[Array]:
        """Loss of each slot and option, the neighbours at the given positions; never falling with the usage."""
        n = len(self._slots)
        common, own, slope = weights[0], weights[1 : n + 1], weights[n + 1 : 2 * n + 1]
        free, pair = weights[2 * n + 1 : self.n - len(self._first)], weights[self.n - len(self._first) :]
        here = self._losses[self._slots, list(at)]
        by_neighbours = np.zeros(n)
        np.add.at(by_neighbours, self._first, pair * self._pair_scale * here[self._second])
        np.add.at(by_neighbours, self._second, pair * self._pair_scale * here[self._first])
        table = self._losses * (common + own + by_neighbours)[:, None] + self._slopes * slope[:, None]
        for (slot, index), weight in zip(self._free, free, strict=True):
            table[slot, index] = weight
        rising = np.where(self._used[:, None], np.maximum.accumulate(table, axis=1), table)
        rows = [rising[slot, :length] for slot, length in enumerate(self._lengths)]
        return [np.where(bad, np.inf, row) for row, bad in zip(rows, self.forbidden, strict=True)]
