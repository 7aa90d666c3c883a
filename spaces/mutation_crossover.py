"""Mutation, crossover and repair of levels under targets, for spaces with a level for each unit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.spaces.levels import Balance, Table, Window, total_usage

Levels = tuple[int, ...]
ATTEMPTS = 16  # random variations before the systematic search for a neighbour


def first_behind(depth: float, blocks: Sequence[int]) -> int:
    """Index of the first unit behind a share of the blocks, in [0, 1), rounded down to whole blocks.

    Args:
        depth: the share.
        blocks: block of each unit, ascending.
    """
    n_before = int(depth * (blocks[-1] + 1)) if blocks else 0
    return bisect_left(blocks, n_before)


class LevelVariation:
    """Mutation by level switches as in EvoPress (arXiv 2410.14649): one unit up a level, another down.

    In EvoPress a level is a fixed number of weights, so that switches preserve the total; here other units compensate
    for the difference.

    Args:
        table: usage of each unit at each of its levels.
        windows: totals that meet each target; disjoint.
        uniform: uniform levels of each target.
    """

    def __init__(self, table: Table, windows: Sequence[Window], uniform: Sequence[Levels]) -> None:
        self._table = table
        self._windows = tuple(windows)
        self._uniform = tuple(uniform)

    def total(self, levels: Sequence[int]) -> int:
        return total_usage(self._table, levels)

    def target_of(self, levels: Sequence[int]) -> int | None:
        """Index of the target that the levels meet, or None."""
        total = self.total(levels)
        return next((i for i, window in enumerate(self._windows) if total in window), None)

    def sample(
        self, shares: Sequence[NDArray[np.float64]], sparsity: float, target: int, rng: np.random.Generator
    ) -> Levels:
        """Random levels: half are the uniform levels after 1 to n switches (log-uniform), half are Dirichlet draws.

        The latter distribute the kept weights by a symmetric Dirichlet distribution (concentration 0.5 to 50,
        log-uniform).

        Args:
            shares: fraction of each unit removed by its levels.
            sparsity: fraction removed by the target.
        """
        n_units = len(self._table)
        for _ in range(ATTEMPTS):
            if rng.random() < 0.5:
                n_switches = int(np.exp(rng.uniform(0, np.log(n_units + 1))))
                found = self.switch(self._uniform[target], target, n_switches, rng)
            else:
                draw = rng.gamma(np.exp(rng.uniform(np.log(0.5), np.log(50))), size=n_units)
                removed = 1 - (1 - sparsity) * draw / (draw.mean() or 1.0)
                levels = [int(np.abs(x - y).argmin()) for x, y in zip(shares, removed.tolist(), strict=True)]
                found = self.settle(levels, target, rng)
            if found is not None:
                return found
        return self._uniform[target]

    def mutate(self, levels: Levels, target: int, rng: np.random.Generator, first: int = 0) -> Levels:
        """A neighbour by min(U{1, 2, 3}, U{1, 2, 3}) level switches, as in EvoPress.

        Args:
            first: units before this one stay as they are, unless no neighbour is found otherwise.
        """
        for _ in range(ATTEMPTS):
            n_switches = int(rng.integers(1, 4, size=2).min())
            found = self.switch(levels, target, n_switches, rng, first)
            if found is not None:
                return found
        if first:
            return self.mutate(levels, target, rng)
        return self._any_neighbour(levels, target, rng)

    def switch(
        self, levels: Levels, target: int, n_switches: int, rng: np.random.Generator, first: int = 0
    ) -> Levels | None:
        """The levels after some switches, different from the old ones; None if the target can't be met.

        In half of the switches both units are random, and other units compensate for the difference of their sizes;
        in the other half one unit is random and the other is preferably of the same size, so that small steps are
        common.
        """
        balance = Balance(self._table, levels, self._windows[target], first)
        n_moves = 0
        for _ in range(n_switches):
            sign = 1 if rng.random() < 0.5 else -1
            for direction in (sign, -sign) if rng.random() < 0.5 else (sign,):
                unit = balance.any_fresh(direction, rng)
                if unit is not None:
                    balance.move(unit, direction)
                    n_moves += 1
        if n_moves == 0 or not balance.settle(rng):
            return None
        return tuple(balance.levels)

    def switch_alike(
        self, levels: Levels, target: int, kinds: Sequence[Sequence[int]], rng: np.random.Generator
    ) -> Levels:
        """A neighbour by 1 to 3 switches, each between two units of one kind, as in DarwinLM (arXiv 2502.07780).

        A kind is chosen in proportion to its number of units, then one of its units that can go down a level, then one
        that can go up. Units of a kind whose levels differ in usage are switched only where the target stays met.

        Args:
            kinds: indices of the units of each kind.
        """
        sizes = np.array([len(units) for units in kinds])
        for _ in range(10 * ATTEMPTS):
            found = list(levels)
            for _ in range(int(rng.integers(1, 4, size=2).min())):
                units = kinds[rng.choice(len(kinds), p=sizes / sizes.sum())]
                down = [unit for unit in units if found[unit] > 0]
                up = [unit for unit in units if found[unit] + 1 < len(self._table[unit])]
                if down and up:
                    found[down[rng.integers(len(down))]] -= 1
                    found[up[rng.integers(len(up))]] += 1
            if tuple(found) != levels and self.total(found) in self._windows[target]:
                return tuple(found)
        return levels

    def _any_neighbour(self, levels: Levels, target: int, rng: np.random.Generator) -> Levels:
        """The first neighbour found by a systematic search; the levels themselves if there is none."""
        for unit in rng.permutation(len(self._table)).tolist():
            for direction in (1, -1):
                balance = Balance(self._table, levels, self._windows[target])
                if unit in balance.fresh(direction):
                    balance.move(unit, direction)
                    if balance.settle(rng):
                        return tuple(balance.levels)
        return levels

    def jump(
        self, levels: Levels, target: int, jumps: Mapping[int, int], rng: np.random.Generator
    ) -> Levels | None:
        """The levels with new levels for some units, by index, compensated by the others; None if that fails."""
        balance = Balance(self._table, levels, self._windows[target])
        for unit, level in jumps.items():
            balance.put(unit, level)
        return tuple(balance.levels) if balance.settle(rng) else None

    def mix(self, first: Levels, second: Levels, target: int, rng: np.random.Generator) -> Levels:
        """Uniform crossover: each unit's level from either parent, then repaired."""
        mask = (rng.random(len(self._table)) < 0.5).tolist()
        pairs = zip(mask, first, second, strict=True)
        return self.repair(tuple(a if take else b for take, a, b in pairs), target, rng)

    def repair(self, levels: Levels, target: int, rng: np.random.Generator) -> Levels:
        """The levels themselves if they meet the target, else similar ones that do."""
        if self.total(levels) in self._windows[target]:
            return levels
        for _ in range(ATTEMPTS):
            found = self.settle(levels, target, rng)
            if found is not None:
                return found
        return self._uniform[target]

    def settle(self, levels: Sequence[int], target: int, rng: np.random.Generator) -> Levels | None:
        """The levels after random moves to meet the target; None if that fails."""
        balance = Balance(self._table, levels, self._windows[target])
        return tuple(balance.levels) if balance.settle(rng) else None
