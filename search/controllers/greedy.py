"""The controller `greedy`: removes what hurts least, again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.controllers.batches import Batches, Course, check_fidelities, fidelity_of
from secateur.search.controllers.sensitivity import separable
from secateur.search.controllers.separable import with_free_slots
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import SeparableSpace, Space

Moves = Literal["block", "sublayer", "level"]
Positions = tuple[int, ...]
"""For each slot the position of its option."""


@dataclass(frozen=True)
class _Step:
    """What one removal is: of the slots of a block together or of one slot, all that goes or a level."""

    together: bool
    whole: bool


_STEPS: dict[Moves, _Step] = {
    "block": _Step(together=True, whole=True),
    "sublayer": _Step(together=False, whole=True),
    "level": _Step(together=False, whole=False),
}


class GreedySettings(Section):
    """What one step removes.

    Args:
        moves: a whole ``block``, as SLEB does; a whole slot (``sublayer``, or whatever the space's slots are), as
            BlockPruner and FinerCut do; or one ``level`` of a slot, which takes the most measurements.
        n_tokens: which fidelity to measure at; None: the smallest.
    """

    kind: Literal["greedy"] = "greedy"
    moves: Moves = "sublayer"
    n_tokens: int | None = None


class GreedyCourse:
    """The steps and the candidates that they lead to; `greedy` runs it alone, `evolution` may start with it.

    Args:
        space: separable.
        fidelities: ascending, of the part ``search``.
        seed: of the space's repairs; nothing else is random.
        settings: what one step removes.

    Raises:
        ValueError: if `n_tokens` names no fidelity.
    """

    def __init__(
        self, space: SeparableSpace[Any], fidelities: Sequence[Fidelity], seed: int, settings: GreedySettings
    ) -> None:
        self._space = space
        self._fidelity = fidelity_of(fidelities, settings.n_tokens)
        self._seed = seed
        self._step = _STEPS[settings.moves]
        self._groups = self._find_groups()
        self._now: Positions = (0,) * len(space.slots)
        self.solutions: dict[int, list[Any]] = {}  # target -> candidates, as far as the course has come

    @property
    def n_measurements(self) -> int:
        """Those of the first step: how many follow is not known before."""
        return len(self._removals(0))

    def run(self) -> Course:
        """Pass through all targets; fills in `solutions`."""
        for target in range(len(self._space.targets)):
            yield from self.reach(target)

    def reach(self, target: int) -> Course:
        """Go on to the target, from the one before."""
        low, _ = self._space.usage_bounds(target)
        while self._usage(self._now) < low and (removals := self._removals(target)):
            losses = yield [Proposal(self._assembled(each), self._fidelity) for each in removals]
            if not any(map(math.isfinite, losses)):
                break
            self._now = removals[int(np.argmin(losses))]  # the first of equals
        rng = np.random.default_rng((self._seed, target))
        solution = self._space.repair(self._assembled(self._now), target, rng)
        self.solutions[target] = with_free_slots(self._space, solution)

    def _find_groups(self) -> list[list[int]]:
        """Slots that one step removes together."""
        groups: dict[int, list[int]] = {}
        for slot in range(len(self._space.slots)):
            groups.setdefault(self._space.block_of(slot) if self._step.together else slot, []).append(slot)
        return list(groups.values())

    def _removals(self, target: int) -> list[Positions]:
        """What one more step leads to, as far as it does not go beyond the target."""
        before, (_, high) = self._usage(self._now), self._space.usage_bounds(target)
        found = []
        for group in self._groups:
            after = list(self._now)
            for slot in group:
                last = len(self._space.options(slot)) - 1
                after[slot] = last if self._step.whole else min(after[slot] + 1, last)
            if before < self._usage(after) <= high:
                found.append(tuple(after))
        return found

    def _options(self, positions: Sequence[int]) -> list[int]:
        return [self._space.options(slot)[position] for slot, position in enumerate(positions)]

    def _usage(self, positions: Sequence[int]) -> int:
        return sum(map(self._space.usage, range(len(positions)), self._options(positions)))

    def _assembled(self, positions: Sequence[int]) -> Any:
        return self._space.assemble(self._options(positions))


class Greedy(Controller):
    """From the dense model on, every step measures all single removals and keeps the one with the smallest loss.

    As in SLEB (arXiv 2402.09025), BlockPruner (arXiv 2406.10594) and FinerCut (arXiv 2405.18218), which differ in what
    is removed, in the loss, and in what stays (their first or last blocks: the space's business here). One sequence
    of steps passes through all targets. Where the next removal would be too large for a target, the space's repair
    closes the gap; the sequence itself goes on without it, so that what is removed for a smaller target is removed
    for a larger one too. The candidate of each target is measured at the largest fidelity; where there are several
    repairs, with each of them, and the steps with the first.

    When to use it: few slots, or targets that are small. Measurements grow with the number of slots times the number
    of steps, and what looked harmless early is never put back, for which `evolution` starts from its solutions.

    Args:
        space: separable.
        fidelities: ascending, of the part ``search``.
        seed: of repairs; nothing else is random.
        settings: what one step removes.
        objective: name of the value to minimise.

    Raises:
        ValueError: if the space is not separable, or `n_tokens` names no fidelity.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,
        settings: GreedySettings,
        objective: str = "loss",
    ) -> None:
        self._largest = check_fidelities(fidelities)[-1]
        self._n_targets = len(space.targets)
        self._greedy = GreedyCourse(separable(space, "greedy"), fidelities, seed, settings)
        self._batches = Batches(objective, self._course())

    def ask(self, n: int) -> list[Proposal]:
        return self._batches.ask(n)

    def tell(self, trials: Sequence[Trial]) -> None:
        self._batches.tell(trials)

    @property
    def n_measurements(self) -> int:
        return self._greedy.n_measurements + 1

    def _course(self) -> Course:
        for target in range(self._n_targets):
            yield from self._greedy.reach(target)
            yield [Proposal(candidate, self._largest) for candidate in self._greedy.solutions[target]]
