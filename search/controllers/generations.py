"""Base of controllers that propose generations: new candidates of each target in turn, by successive halving."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from secateur.search.controller import Proposal
from secateur.search.controllers.procedure import ProcedureController, SearchProcedure, check_fidelities
from secateur.search.controllers.successive_halving import Ranked, n_survivors, ranked, successive_halving
from secateur.spaces.measurement import Fidelity
from secateur.spaces.space import Space

ATTEMPTS = 50  # mutations in a row for one new candidate


class GenerationalController(ProcedureController):
    """Generations of new candidates for each target in turn, and the elites of each target.

    A generation: distinct new candidates; successive halving over the fidelities; the candidates measured at the
    largest fidelity compete with the elites, which were measured there too. Generation g has its own random
    generator, seeded by (seed, g).

    If all open generations wait for results, `ask` begins another one: generations overlap as far as there are idle
    workers, and are sequential with one worker.

    Args:
        space: of the candidates.
        fidelities: ascending.
        seed: of all generations.
        offspring: new candidates of a generation, measured at the smallest fidelity.
        survivors: see `n_survivors`.
        n_elites: kept of each target.
        objective: name of the value to minimise.

    Raises:
        ValueError: if the fidelities are out of order or don't fit `survivors`.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,
        offspring: int,
        survivors: Sequence[int] | None,
        n_elites: int,
        objective: str,
    ) -> None:
        super().__init__(objective)
        self._space = space
        self._fidelities = check_fidelities(fidelities)
        self._seed = seed
        self._n_offspring = offspring
        self._survivors = n_survivors(offspring, survivors, len(self._fidelities))
        self._n_elites = n_elites
        self._elites: list[Ranked] = [[] for _ in space.targets]
        self._starts: list[tuple[int, Any]] | None = (
            None  # first elites, (target, candidate), None until known
        )
        self._seen = {candidate.text for candidate in space.baselines().values()}
        self._generation = 0
        self._n_without_new = 0  # generations in a row without a new candidate

    @property
    def elites(self) -> tuple[tuple[Any, ...], ...]:
        """Elites of each target, best first."""
        return tuple(tuple(candidate for _, candidate in elites) for elites in self._elites)

    @abstractmethod
    def _propose(self, target: int, rng: np.random.Generator, index: int) -> Any:
        """A candidate of the target, the one with this index in its generation; it may be known."""

    def _mutate(self, candidate: Any, rng: np.random.Generator) -> Any:
        return self._space.mutate(candidate, rng)

    def _start_with(
        self, starts: Sequence[tuple[int, Any]], known: Mapping[str, float] = MappingProxyType({})
    ) -> SearchProcedure:
        """Measure the uniform candidates and these, the first elites; `known` are losses at the largest fidelity."""
        uniform = [c for name, c in self._space.baselines().items() if name != "dense"]
        self._starts = [(b, c) for c in uniform if (b := self._space.target_of(c)) is not None] + list(starts)
        new = [candidate for _, candidate in self._starts if candidate.text not in known]
        losses = yield [Proposal(candidate, self._fidelities[-1]) for candidate in new]
        found = dict(known) | {c.text: loss for c, loss in zip(new, losses, strict=True)}
        for target, candidate in self._starts:
            self._seen.add(candidate.text)
            self._keep(target, [(found[candidate.text], candidate)])

    def _begin(self) -> bool:
        """Open the next generation with a new candidate."""
        n_targets = len(self._elites)
        while self._starts is not None and self._n_without_new < n_targets:
            target = self._generation % n_targets
            offspring = self._offspring(target, np.random.default_rng((self._seed, self._generation)))
            if not offspring and self._n_open:  # later results may lead to new ones
                return False
            self._generation += 1
            self._n_without_new = 0 if offspring else self._n_without_new + 1
            if offspring:
                self._open(self._compete(target, offspring))
                return True
        return False

    def _compete(self, target: int, candidates: list[Any]) -> SearchProcedure:
        """Successive halving; candidates measured at the largest fidelity compete with the elites."""
        self._keep(target, (yield from successive_halving(candidates, self._fidelities, self._survivors)))

    def _keep(self, target: int, newcomers: Ranked) -> None:
        """Keep the best as elites; older ones win ties, infeasible ones are never kept."""
        known = {candidate.text for _, candidate in self._elites[target]}
        new = [(x, c) for x, c in newcomers if math.isfinite(x) and c.text not in known]
        self._elites[target] = ranked([*self._elites[target], *new])[: self._n_elites]

    @property
    def _n_new(self) -> int:
        """New candidates of the next generation."""
        return self._n_offspring

    def _offspring(self, target: int, rng: np.random.Generator) -> list[Any]:
        """Distinct new candidates of the target, known ones mutated; fewer, or none, if no more are found."""
        found = []
        for index in range(self._n_new):
            child = self._propose(target, rng, index)
            for _ in range(ATTEMPTS):
                if child.text not in self._seen:
                    self._seen.add(child.text)
                    found.append(child)
                    break
                child = self._mutate(child, rng)
            else:
                break
        return found
