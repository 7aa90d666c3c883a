"""The space `allocation`: how sparse each unit of the model is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from secateur.spaces.budget import Balance, check_ascending, level_out, n_zeros, total_usage, window
from secateur.spaces.cost import ModelShape
from secateur.spaces.space import SeparableSpace
from secateur.spaces.units import Prunable, Unit

ATTEMPTS = 16  # random variations that are tried before the systematic search for any neighbour


@dataclass(frozen=True)
class Allocation:
    """A level for each unit, an index into the space's levels.

    Its text lists the levels in order, equal neighbours as ``<level>x<times>``: ``allocation:12x5,13,9``.
    """

    levels: tuple[int, ...]

    @cached_property
    def text(self) -> str:
        """Canonical text; `parse` is its inverse."""
        runs = [(level, len(list(group))) for level, group in groupby(self.levels)]
        return "allocation:" + ",".join(f"{level}x{n}" if n > 1 else f"{level}" for level, n in runs)

    @classmethod
    def parse(cls, text: str) -> Allocation:
        """The allocation with this canonical text.

        Raises:
            ValueError: if no allocation prints like this.
        """
        kind, _, body = text.partition(":")
        runs = [re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", run, re.ASCII) for run in body.split(",")]
        if kind == "allocation":
            levels = [level for run in runs if run for level in [int(run[1])] * int(run[2] or 1)]
            allocation = cls(tuple(levels))
            if allocation.text == text:
                return allocation
        raise ValueError(f"Expected an allocation such as 'allocation:12x5,13,9', got {text!r}.")


class AllocationSpace(SeparableSpace[Allocation]):
    """A level of sparsity for each unit, with the sparsity over all prunable weights held at a target.

    The global sparsity counts every linear of every block: the protected ones too, which stay dense, so
    that the others make up for them. Level switches as in EvoPress (arXiv 2410.14649): one unit up a level,
    another down. There a level is a fixed number of weights, so that any two units can be switched; here a
    level is a sparsity, the same for all units, and several small units make up for a large one.

    Costs: ``sparsity`` (zeros / prunable weights), ``params`` (non-zero parameters of the whole model),
    ``size_bytes`` (as stored: unstructured zeros take as much room as other weights), ``macs`` a token (a
    dense computation, which multiplies by zeros too), ``kv_bytes`` a token.

    Args:
        units: what can be switched.
        protected: prunable linears that stay dense.
        levels: sparsities, ascending, the first 0.
        targets: global sparsities, ascending: the budgets.
        shape: the dense model.

    Raises:
        ValueError: on levels or targets that are out of order or range, and on a target that can't be met.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        protected: Sequence[Prunable],
        levels: Sequence[float],
        targets: Sequence[float],
        shape: ModelShape,
    ) -> None:
        check_ascending("levels", levels)
        check_ascending("target", targets)
        if len(levels) < 2 or levels[0] != 0:
            raise ValueError(f"Expected `levels` to start at 0 and go on, got {list(levels)}.")
        self._units = tuple(units)
        self._protected = tuple(protected)
        self._levels = tuple(levels)
        self._targets = tuple(targets)
        self._shape = shape
        self._table = tuple(
            tuple(sum(n_zeros(level, size) for size in unit.sizes) for level in levels) for unit in units
        )
        self._n_free = sum(sum(unit.sizes) for unit in units)
        self._n_weights = self._n_free + sum(linear.n_weights for linear in protected)
        n_members = sum(len(unit.members) for unit in units)
        step = min(sum(unit.sizes) for unit in units) * levels[-1] / (len(levels) - 1)
        self._windows = tuple(window(self._table, t, self._n_weights, n_members, step) for t in targets)
        self._uniform = tuple(self._level_out(budget) for budget in range(len(targets)))

    def _level_out(self, budget: int) -> Allocation:
        """The most uniform allocation that meets the budget; also shows that there is one."""
        target, bounds = self._targets[budget], self._windows[budget]
        highest = sum(row[-1] for row in self._table)
        if bounds.low > highest:
            raise ValueError(
                f"Expected `target` from 0 to {highest / self._n_weights:.4g} (all units "
                f"at sparsity {self._levels[-1]:g}, {len(self._protected)} linears protected), got {target:g}. "
                f"Lower it, raise `max_sparsity`, or protect less."
            )
        levels = level_out(self._table, bounds)
        if levels is None:
            step = (bounds.high - bounds.low) / self._n_weights
            raise ValueError(
                f"Expected a `target` that the levels of {len(self._units)} units can meet to within "
                f"{step:.2g}, got {target:g}. Use a smaller `step`, units of equal size, or another target."
            )
        if budget and bounds.low <= self._windows[budget - 1].high:
            raise ValueError(
                f"Expected targets that the levels tell apart, got {self._targets[budget - 1]:.10g} and "
                f"{target:.10g}. Use a smaller `step` or fewer targets."
            )
        return Allocation(levels)

    @property
    def budgets(self) -> tuple[float, ...]:
        return self._targets

    @property
    def levels(self) -> tuple[float, ...]:
        """Sparsity of each level."""
        return self._levels

    def parse(self, text: str) -> Allocation:
        return self._checked(Allocation.parse(text))

    def baselines(self) -> dict[str, Allocation]:
        named = {"dense": Allocation((0,) * len(self._units))}
        for target, uniform in zip(self._targets, self._uniform, strict=True):
            named[f"uniform@{target:.10g}"] = uniform
        return named

    def budget_of(self, candidate: Allocation) -> int | None:
        total = self._n_zeros(candidate)
        return next((i for i, bounds in enumerate(self._windows) if total in bounds), None)

    # --- variation ---

    def sample(self, rng: np.random.Generator, budget: int) -> Allocation:
        """Half of them the uniform allocation after 1 to n switches (log-uniform), half of them rough.

        A rough one shares out the kept weights by a symmetric Dirichlet draw (concentration 0.5 to 50,
        log-uniform).
        """
        n_units = len(self._units)
        for _ in range(ATTEMPTS):
            if rng.random() < 0.5:
                n_switches = int(np.exp(rng.uniform(0, np.log(n_units + 1))))
                found = self._switch(self._uniform[budget], budget, n_switches, rng)
            else:
                share = rng.gamma(np.exp(rng.uniform(np.log(0.5), np.log(50))), size=n_units)
                keep = (1 - self._targets[budget]) * share / (share.mean() or 1.0)
                distance = np.abs(np.asarray(self._levels) - (1 - keep)[:, None])
                found = self._settle(distance.argmin(axis=1).tolist(), budget, rng)
            if found is not None:
                return found
        return self._uniform[budget]

    def mutate(self, candidate: Allocation, rng: np.random.Generator) -> Allocation:
        """A neighbour a few level switches away: min(U{1, 2, 3}, U{1, 2, 3}) of them, as in EvoPress.

        In half of the switches the unit up and the unit down are both random and other units make up for the
        difference of their sizes; in the other half one is random and a unit of the same size is preferred
        as the other, so that the mixing between sizes is left to chance but small steps remain common.
        """
        budget = self._budget(candidate)
        for _ in range(ATTEMPTS):
            n_switches = int(rng.integers(1, 4, size=2).min())
            found = self._switch(candidate, budget, n_switches, rng)
            if found is not None:
                return found
        for unit in rng.permutation(len(self._units)).tolist():
            for direction in (1, -1):
                balance = Balance(self._table, candidate.levels, self._windows[budget])
                if unit in balance.fresh(direction):
                    balance.move(unit, direction)
                    if balance.settle(rng):
                        return Allocation(tuple(balance.levels))
        return candidate

    def _switch(
        self, candidate: Allocation, budget: int, n_switches: int, rng: np.random.Generator
    ) -> Allocation | None:
        """The candidate after some switches, never itself; None if they lead out of the budget."""
        balance = Balance(self._table, candidate.levels, self._windows[budget])
        n_moves = 0
        for _ in range(n_switches):
            first = 1 if rng.random() < 0.5 else -1
            for direction in (first, -first) if rng.random() < 0.5 else (first,):
                unit = balance.any_fresh(direction, rng)
                if unit is not None:
                    balance.move(unit, direction)
                    n_moves += 1
        if n_moves == 0 or not balance.settle(rng):
            return None
        return Allocation(tuple(balance.levels))

    def crossover(self, first: Allocation, second: Allocation, rng: np.random.Generator) -> Allocation:
        """Each unit's level from the one or the other with equal odds, then repaired."""
        budget = self._budget(first)
        mask = (rng.random(len(self._units)) < 0.5).tolist()
        pairs = zip(mask, first.levels, second.levels, strict=True)
        mixed = Allocation(tuple(a if take else b for take, a, b in pairs))
        return self.repair(mixed, budget, rng)

    def repair(self, candidate: Allocation, budget: int, rng: np.random.Generator) -> Allocation:
        if self._n_zeros(candidate) in self._windows[budget]:
            return candidate
        for _ in range(ATTEMPTS):
            found = self._settle(candidate.levels, budget, rng)
            if found is not None:
                return found
        return self._uniform[budget]

    def _settle(self, levels: Sequence[int], budget: int, rng: np.random.Generator) -> Allocation | None:
        balance = Balance(self._table, levels, self._windows[budget])
        return Allocation(tuple(balance.levels)) if balance.settle(rng) else None

    # --- what a candidate means ---

    def cost(self, candidate: Allocation) -> Mapping[str, float]:
        zeros, shape = self._n_zeros(candidate), self._shape
        return {
            "sparsity": zeros / self._n_weights,
            "params": shape.n_params - zeros,
            "size_bytes": shape.n_params * shape.bytes_per_param,
            "macs": shape.macs_per_token,
            "kv_bytes": shape.kv_bytes_per_token,
        }

    def config(self, candidate: Allocation) -> Mapping[str, Any]:
        """``{"sparsity": {name of the linear: its sparsity}}``, protected linears included."""
        sparsity = {linear.name: 0.0 for linear in self._protected}
        for unit, level in zip(self._units, candidate.levels, strict=True):
            sparsity |= dict.fromkeys(unit.members, self._levels[level])
        return {"sparsity": sparsity}

    # --- separable view ---

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(unit.name for unit in self._units)

    def options(self, slot: int) -> Sequence[int]:
        return range(len(self._table[slot]))

    def usage(self, slot: int, option: int) -> int:
        return self._table[slot][option]

    def share(self, slot: int, option: int) -> float:  # levels are the same for all units
        return self._levels[option]

    def usage_bounds(self, budget: int) -> tuple[int, int]:
        return self._windows[budget].low, self._windows[budget].high

    def assemble(self, options: Sequence[int]) -> Allocation:
        return self._checked(Allocation(tuple(options)))

    def disassemble(self, candidate: Allocation) -> tuple[int, ...]:
        return candidate.levels

    # --- helpers ---

    def _n_zeros(self, candidate: Allocation) -> int:
        return total_usage(self._table, candidate.levels)

    def _budget(self, candidate: Allocation) -> int:
        budget = self.budget_of(candidate)
        if budget is None:
            raise ValueError(
                f"Expected `candidate` to meet a budget, got {candidate.text!r} with sparsity "
                f"{self._n_zeros(candidate) / self._n_weights:.4f}. Call `repair` first."
            )
        return budget

    def _checked(self, candidate: Allocation) -> Allocation:
        if len(candidate.levels) != len(self._units):
            raise ValueError(
                f"Expected one level for each of {len(self._units)} units, got {len(candidate.levels)}."
            )
        for unit, level in zip(self._units, candidate.levels, strict=True):
            if not 0 <= level < len(self._levels):
                raise ValueError(f"Expected levels to {len(self._levels) - 1}, got {level} at {unit.name}.")
        return candidate
