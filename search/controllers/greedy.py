"""The controller `greedy`: removal of the part with the smallest loss at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from secateur.search.controller import Proposal
from secateur.search.controllers.procedure import (
    ProcedureController,
    SearchProcedure,
    check_fidelities,
    fidelity_of,
)
from secateur.search.controllers.separable import check_separable, with_free_slots
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import SeparableSpace, Space

Positions = tuple[int, ...]
"""Position of each slot's option."""


class GreedySettings(Section):
    """Settings of the controller `greedy`.

    Args:
        moves: removal of one step: a whole ``block`` as in SLEB; a whole slot of the space (``sublayer``) as in
            BlockPruner and FinerCut; or one ``level`` of a slot, which takes the most measurements.
        n_tokens: fidelity of the steps; None: the smallest.
    """

    kind: Literal["greedy"] = "greedy"
    moves: Literal["block", "sublayer", "level"] = "sublayer"
    n_tokens: int | None = None


class GreedyProcedure:
    """Greedy removal; `greedy` runs it alone, `evolution` may start with it.

    The seed is of the space's repairs; the steps are deterministic.

    Raises:
        ValueError: if `n_tokens` names no fidelity.
    """

    def __init__(
        self, space: SeparableSpace[Any], fidelities: Sequence[Fidelity], seed: int, settings: GreedySettings
    ) -> None:
        self._space = space
        self._fidelity = fidelity_of(fidelities, settings.n_tokens)
        self._seed = seed
        self._whole = settings.moves != "level"  # slots, or one level
        self._groups: dict[int, list[int]] = {}  # slots removed together in one step
        for slot in range(len(space.slots)):
            key = space.block_of(slot) if settings.moves == "block" else slot
            self._groups.setdefault(key, []).append(slot)
        self._positions: Positions = (0,) * len(space.slots)
        self.solutions: dict[int, list[Any]] = {}  # target -> candidates, for targets reached so far

    @property
    def n_measurements(self) -> int:
        """Measurements of the first step; the number of further steps is not known in advance."""
        return len(self._removals(0))

    def run(self) -> SearchProcedure:
        """Reach all targets in turn; fills `solutions`."""
        for target in range(len(self._space.targets)):
            yield from self.reach(target)

    def reach(self, target: int) -> SearchProcedure:
        """Continue from the previous target to this one."""
        low, _ = self._space.usage_bounds(target)
        while self._usage(self._positions) < low and (removals := self._removals(target)):
            losses = yield [Proposal(self._assembled(each), self._fidelity) for each in removals]
            if not any(map(math.isfinite, losses)):
                break
            self._positions = removals[int(np.argmin(losses))]  # the first of ties
        rng = np.random.default_rng((self._seed, target))
        solution = self._space.repair(self._assembled(self._positions), target, rng)
        self.solutions[target] = with_free_slots(self._space, solution)

    def _removals(self, target: int) -> list[Positions]:
        """Results of one more step that do not exceed the target."""
        before, (_, high) = self._usage(self._positions), self._space.usage_bounds(target)
        found = []
        for group in self._groups.values():
            after = list(self._positions)
            for slot in group:
                last = len(self._space.options(slot)) - 1
                after[slot] = last if self._whole else min(after[slot] + 1, last)
            if before < self._usage(after) <= high:
                found.append(tuple(after))
        return found

    def _options(self, positions: Sequence[int]) -> list[int]:
        return [self._space.options(slot)[position] for slot, position in enumerate(positions)]

    def _usage(self, positions: Sequence[int]) -> int:
        return sum(map(self._space.usage, range(len(positions)), self._options(positions)))

    def _assembled(self, positions: Sequence[int]) -> Any:
        return self._space.assemble(self._options(positions))


class Greedy(ProcedureController):
    """Greedy search from the dense model: each step measures all single removals and makes the best one.

    As in SLEB (arXiv 2402.09025), BlockPruner (arXiv 2406.10594) and FinerCut (arXiv 2405.18218), which differ in the
    unit of removal, the loss, and the protected first or last blocks (here: protected by the space). One sequence of
    steps serves all targets. If the next removal would exceed a target, the space's repair closes the gap; the
    sequence continues without this repair, so that removals for a smaller target are nested in those for a larger
    one. The candidate of each target is measured at the largest fidelity, with each of several repairs; the steps use
    the first repair.

    When to use it: few slots or small targets. The number of measurements grows with slots times steps, and an early
    removal is never undone; `evolution` can improve on its solutions.

    Raises:
        ValueError: if the space is not separable, or `n_tokens` names no fidelity.
    """

    ending = "its removals have reached the last target"

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,  # of repairs
        settings: GreedySettings,
        objective: str = "loss",
    ) -> None:
        super().__init__(objective)
        self._largest = check_fidelities(fidelities)[-1]
        self._greedy = GreedyProcedure(check_separable(space, "greedy"), fidelities, seed, settings)
        self._open(self._procedure(len(space.targets)))

    @property
    def n_measurements(self) -> int:
        return self._greedy.n_measurements + 1

    def _procedure(self, n_targets: int) -> SearchProcedure:
        for target in range(n_targets):
            yield from self._greedy.reach(target)
            yield [Proposal(candidate, self._largest) for candidate in self._greedy.solutions[target]]
