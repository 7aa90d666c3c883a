"""The space `allocation`: a level of sparsity for each unit of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from secateur.spaces.levels import (
    Sparsities,
    Window,
    check_ascending,
    level_out,
    n_zeros,
    rounded_share,
    sparsities_of,
    total_usage,
    window,
)
from secateur.spaces.mutation_crossover import Levels, LevelVariation, first_behind
from secateur.spaces.shape import ModelShape, Prunable, Unit, role_of
from secateur.spaces.space import SeparableSpace

MAX_UNITS = 1_000_000
"""Most units that a text may list."""


@dataclass(frozen=True)
class Allocation:
    """Level of each unit, an index into the space's levels.

    Its text lists the levels in order, equal neighbours as ``<level>x<times>``: ``allocation:12x5,13,9``.
    """

    levels: tuple[int, ...]

    @cached_property
    def text(self) -> str:
        runs = [(level, len(list(group))) for level, group in groupby(self.levels)]
        return "allocation:" + ",".join(f"{level}x{n}" if n > 1 else f"{level}" for level, n in runs)

    @classmethod
    def parse(cls, text: str) -> Allocation:
        """Allocation with this canonical text.

        Raises:
            ValueError: if it is not the text of an allocation.
        """
        kind, _, body = text.partition(":")
        runs = [_run(run) for run in body.split(",")]
        equal = any(before[0] == after[0] for before, after in pairwise(runs))
        if kind != "allocation" or equal or (0, 0) in runs or sum(n for _, n in runs) > MAX_UNITS:
            raise ValueError(f"Expected an allocation such as 'allocation:12x5,13,9', got {text[:80]!r}.")
        return cls(tuple([level for level, n in runs for _ in range(n)]))


@lru_cache(maxsize=1 << 12)  # a study has few, and repeats them in each line
def _run(text: str) -> tuple[int, int]:
    """Level and length of a run in canonical form; (0, 0) for any other text."""
    found = re.fullmatch(r"(0|[1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text, re.ASCII)
    return (int(found[1]), int(found[2] or 1)) if found and found[2] != "1" else (0, 0)


class AllocationSpace(SeparableSpace[Allocation]):
    """A level of sparsity for each unit, with the sparsity over all prunable weights held at a target.

    The global sparsity includes protected linears, which remain dense, so that the others are pruned more. All units
    have the same levels, or levels that are the same number of weights apart. Mutation and crossover: see
    `LevelVariation`.

    Costs: ``sparsity`` (zeros / prunable weights), ``params`` (non-zero parameters of the whole model),
    ``size_bytes`` (as stored: unstructured zeros take as much space as other weights), ``macs`` a token (of a dense
    computation, zeros included), ``kv_bytes`` a token.

    Args:
        units: with one level each.
        protected: prunable linears kept dense.
        levels: sparsities, ascending, the first 0; by a linear's number of weights where these are the same number of
            weights apart, see `levels_by_weights`: units are single linears then.
        targets: global sparsities, ascending.
        found: sparsity of each linear, one of its levels, of the allocation that the levels are around: the reference,
            ``found@...``, in place of the uniform allocation; with one target.

    Raises:
        ValueError: if levels or targets are out of order or range, or a target can't be met.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        protected: Sequence[Prunable],
        levels: Sparsities,
        targets: Sequence[float],
        shape: ModelShape,
        found: Mapping[str, float] | None = None,
    ) -> None:
        check_ascending("target", targets)
        self._units = tuple(units)
        self._protected = tuple(protected)
        self._levels = levels if isinstance(levels, Mapping) else tuple(levels)
        self._targets = tuple(targets)
        self._found = found
        self._shape = shape
        self._shares = tuple(
            _checked_levels(sparsities_of(levels, unit.sizes[0], unit.members[0])) for unit in units
        )
        self._table = tuple(
            tuple(sum(n_zeros(level, size) for size in unit.sizes) for level in shares)
            for unit, shares in zip(units, self._shares, strict=True)
        )
        self._n_free = sum(sum(unit.sizes) for unit in units)
        self._n_weights = self._n_free + sum(linear.n_weights for linear in protected)
        self._windows = tuple(self._window(target) for target in targets)
        self._uniform = tuple(self._level_out(target) for target in range(len(targets)))
        self._variation = LevelVariation(self._table, self._windows, self._uniform)

    def _window(self, target: float) -> Window:
        """Totals that meet a target: exact up to rounding, or up to one level step above it, see `window`."""
        n_members = sum(len(unit.members) for unit in self._units)
        if not isinstance(self._levels, Mapping):
            step = min(sum(unit.sizes) for unit in self._units) * self._levels[-1] / (len(self._levels) - 1)
            return window(self._table, target, self._n_weights, n_members, step)
        wanted, slack = rounded_share(target, self._n_weights), n_members // 2 + 1
        uniform = total_usage(self._table, self._nearest(target))
        if abs(uniform - wanted) <= slack:
            return Window(wanted - slack, wanted + slack)
        return Window(wanted - slack, wanted + max(slack, *(row[-1] - row[-2] for row in self._table)))

    def _nearest(self, sparsity: float) -> Levels:
        """Level of each unit that is nearest to a sparsity, or of the found allocation."""
        if self._found is not None:
            named = zip(self._units, self._shares, strict=True)
            return tuple(shares.index(self._found[unit.members[0]]) for unit, shares in named)
        return tuple(int(np.abs(np.asarray(shares) - sparsity).argmin()) for shares in self._shares)

    def _level_out(self, target: int) -> Levels:
        """The most uniform levels that meet the target; raises if there are none."""
        sparsity, bounds = self._targets[target], self._windows[target]
        highest = sum(row[-1] for row in self._table)
        if bounds.low > highest:
            raise ValueError(
                f"Expected `target` from 0 to {highest / self._n_weights:.4g} (all units "
                f"at their highest level, {len(self._protected)} linears protected), got {sparsity:g}. "
                f"Lower it, raise `max_sparsity`, or protect less."
            )
        if isinstance(self._levels, Mapping):
            levels = LevelVariation(self._table, [bounds], ()).settle(
                self._nearest(sparsity), 0, np.random.default_rng(0)
            )
        else:
            levels = level_out(self._table, bounds)
        if levels is None:
            step = (bounds.high - bounds.low) / self._n_weights
            raise ValueError(
                f"Expected a `target` that the levels of {len(self._units)} units can meet to within "
                f"{step:.2g}, got {sparsity:g}. Use a smaller `step`, units of equal size, or another target."
            )
        if target and bounds.low <= self._windows[target - 1].high:
            raise ValueError(
                f"Expected targets that the levels tell apart, got {self._targets[target - 1]:.10g} and "
                f"{sparsity:.10g}. Use a smaller `step` or fewer targets."
            )
        return levels

    @property
    def targets(self) -> tuple[float, ...]:
        return self._targets

    @property
    def levels(self) -> Sparsities:
        """Sparsity of each level, see `sparsities_of`."""
        return self._levels

    def parse(self, text: str) -> Allocation:
        return self._checked(Allocation.parse(text))

    def baselines(self) -> dict[str, Allocation]:
        named = {"dense": Allocation((0,) * len(self._units))}
        kind = "uniform" if self._found is None else "found"
        for target, uniform in enumerate(self._uniform):
            named[self.named(kind, target)] = Allocation(uniform)
        return named

    def target_of(self, candidate: Allocation) -> int | None:
        return self._variation.target_of(candidate.levels)

    # --- variation ---

    def sample(self, rng: np.random.Generator, target: int) -> Allocation:
        shares = [np.asarray(shares) for shares in self._shares]
        return Allocation(self._variation.sample(shares, self._targets[target], target, rng))

    def mutate(self, candidate: Allocation, rng: np.random.Generator) -> Allocation:
        return self._same_or(
            candidate, self._variation.mutate(candidate.levels, self._met_target(candidate), rng)
        )

    def mutate_after(self, candidate: Allocation, depth: float, rng: np.random.Generator) -> Allocation:
        target, first = self._met_target(candidate), first_behind(depth, [unit.block for unit in self._units])
        return self._same_or(candidate, self._variation.mutate(candidate.levels, target, rng, first))

    def crossover(self, first: Allocation, second: Allocation, rng: np.random.Generator) -> Allocation:
        return Allocation(self._variation.mix(first.levels, second.levels, self._met_target(first), rng))

    def repair(self, candidate: Allocation, target: int, rng: np.random.Generator) -> Allocation:
        return self._same_or(candidate, self._variation.repair(candidate.levels, target, rng))

    # --- meaning of a candidate ---

    def cost(self, candidate: Allocation) -> Mapping[str, float]:
        return self._shape.with_zeros(self._variation.total(candidate.levels), self._n_weights)

    def config(self, candidate: Allocation) -> Mapping[str, Any]:
        """``{"sparsity": {name of the linear: its sparsity}}``, protected linears included."""
        sparsity = {linear.name: 0.0 for linear in self._protected}
        for unit, shares, level in zip(self._units, self._shares, candidate.levels, strict=True):
            sparsity |= dict.fromkeys(unit.members, shares[level])
        return {"sparsity": sparsity}

    def portable(self, candidate: Allocation, linears: Sequence[Prunable]) -> Mapping[str, Any]:
        """``{"blocks": [{"attention": {"q_proj": 0.6, ...}, "mlp": {...}}, ...]}``: sparsities by role."""
        sparsity = self.config(candidate)["sparsity"]
        blocks: list[dict[str, dict[str, float]]] = [{} for _ in range(1 + max(x.block for x in linears))]
        for linear in linears:
            blocks[linear.block].setdefault(linear.sublayer, {})[role_of(linear.name)] = sparsity[linear.name]
        return {"blocks": blocks}

    # --- separable view ---

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(unit.name for unit in self._units)

    def options(self, slot: int) -> Sequence[int]:
        return range(len(self._table[slot]))

    def usage(self, slot: int, option: int) -> int:
        return self._table[slot][option]

    def share(self, slot: int, option: int) -> float:
        return self._shares[slot][option]

    def block_of(self, slot: int) -> int:
        return self._units[slot].block

    def usage_bounds(self, target: int) -> tuple[int, int]:
        return self._windows[target].low, self._windows[target].high

    def assemble(self, options: Sequence[int]) -> Allocation:
        return self._checked(Allocation(tuple(options)))

    def disassemble(self, candidate: Allocation) -> tuple[int, ...]:
        return candidate.levels

    # --- helpers ---

    @staticmethod
    def _same_or(candidate: Allocation, levels: Levels) -> Allocation:
        return candidate if levels is candidate.levels else Allocation(levels)

    def _checked(self, candidate: Allocation) -> Allocation:
        if len(candidate.levels) != len(self._units):
            raise ValueError(
                f"Expected one level for each of {len(self._units)} units, got {len(candidate.levels)}."
            )
        for unit, shares, level in zip(self._units, self._shares, candidate.levels, strict=True):
            if not 0 <= level < len(shares):
                raise ValueError(f"Expected levels to {len(shares) - 1}, got {level} at {unit.name}.")
        return candidate


def _checked_levels(levels: Sequence[float]) -> tuple[float, ...]:
    check_ascending("levels", levels)
    if len(levels) < 2 or levels[0] != 0:
        raise ValueError(f"Expected `levels` to start at 0 and to hold others, got {list(levels)}.")
    return tuple(levels)
