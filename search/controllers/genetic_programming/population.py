"""Population of an island: tournament selection of parents, and survival by loss and size."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from secateur.search.controllers.genetic_programming.settings import GeneticSettings
from secateur.spaces.formulas.space import Formula


@dataclass(frozen=True)
class Individual:
    """A formula with its measurements.

    Args:
        formula: the candidate.
        nodes: its size.
        proxy: loss by the proxy, if it was screened.
        losses: at the fidelities measured so far, the smallest first.
    """

    formula: Formula
    nodes: int
    proxy: float | None = None
    losses: tuple[float, ...] = ()

    def measured(self, loss: float) -> Individual:
        """The individual with its loss at the next fidelity."""
        return replace(self, losses=(*self.losses, loss))


Value = Callable[[Individual], float | None]
"""Value to compare individuals by, lower = better; those with None are skipped."""


def at(level: int) -> Callable[[Individual], Any]:
    """Loss at one of the fidelities, None if it was not measured."""
    return lambda x: x.losses[level] if level < len(x.losses) else None


class Population:
    """Distinct individuals measured at least at the smallest fidelity, limited in number.

    Survivors are ranked by the front of (loss at the smallest fidelity, nodes), then by that loss; elites, the best at
    the largest fidelity, always survive.
    """

    def __init__(self, settings: GeneticSettings, n_fidelities: int) -> None:
        self._settings = settings
        self._n_fidelities = n_fidelities
        self._members: dict[str, Individual] = {}

    @property
    def members(self) -> list[Individual]:
        """All individuals, best first."""
        return list(self._members.values())

    @property
    def elites(self) -> list[Individual]:
        """The best individuals measured at the largest fidelity, best first."""
        return self._ranked(self._members.values(), at(self._n_fidelities - 1))[: self._settings.elites]

    def put(self, newcomers: Iterable[Individual]) -> None:
        """Add or update individuals; the worst are removed."""
        self._members |= {x.formula.text: x for x in newcomers}
        kept = {x.formula.text for x in self.elites}
        ranked = self._ranked(self._members.values(), at(0))
        elites_first = sorted(ranked, key=lambda x: x.formula.text not in kept)
        survivors = {x.formula.text for x in elites_first[: self._settings.population]}
        self._members = {x.formula.text: x for x in ranked if x.formula.text in survivors}

    def best(self, newcomers: Sequence[Individual], value: Value) -> list[Individual]:
        """The newcomers by their rank among all individuals, members included."""
        new = {x.formula.text for x in newcomers}
        members = [x for x in self._members.values() if x.formula.text not in new]
        return [x for x in self._ranked([*members, *newcomers], value) if x.formula.text in new]

    def parent(self, rng: np.random.Generator) -> Individual:
        """Winner of a tournament among random members."""
        members = self.members
        drawn: list[int] = rng.integers(len(members), size=self._settings.tournament).tolist()
        winner = members[drawn[0]]
        for i in drawn[1:]:
            if self._beats(members[i], winner, rng):
                winner = members[i]
        return winner

    def _beats(self, a: Individual, b: Individual, rng: np.random.Generator) -> bool:
        """True if `a` wins against `b`, by the losses at the largest fidelity common to both."""
        level = min(len(a.losses), len(b.losses)) - 1
        gap, larger, parsimony = (
            a.losses[level] - b.losses[level],
            a.nodes - b.nodes,
            self._settings.parsimony,
        )
        if parsimony and larger and (gap == 0 or (gap * larger < 0 and rng.random() < parsimony)):
            return larger < 0
        return gap < 0

    def _ranked(self, individuals: Iterable[Individual], value: Value) -> list[Individual]:
        pairs = [(x, y) for x in individuals if (y := value(x)) is not None]
        sizes = self._settings.parsimony > 0
        order = ranking([(y, x.nodes if sizes else 0) for x, y in pairs])
        return [pairs[i][0] for i in order]


def ranking(points: Sequence[tuple[float, int]]) -> list[int]:
    """Indices of (loss, nodes) pairs by non-dominated front, then by loss, then in the given order.

    The first front holds the points that no other equals or beats in both values, the second those only beaten by the
    first, and so on (Deb et al., NSGA-II, 2002; by a sweep, in n log n).
    """
    smallest: list[int] = []  # least nodes of each front so far, ascending
    fronts: list[tuple[int, float, int]] = []
    for loss, nodes, i in sorted((loss, nodes, i) for i, (loss, nodes) in enumerate(points)):
        front = bisect.bisect_right(smallest, nodes)  # number of fronts with a point as good in both
        smallest[front : front + 1] = [nodes]
        fronts.append((front, loss, i))
    return [i for *_, i in sorted(fronts)]
