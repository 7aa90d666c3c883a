"""The controller `evolution`: elites for each target, varied, winnowed by successive halving."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.controllers.batches import Batches, Course, check_fidelities
from secateur.search.controllers.greedy import GreedyCourse, GreedySettings
from secateur.search.controllers.sensitivity import SensitivityCourse, SensitivitySettings, separable
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import SeparableSpace, Space

ATTEMPTS = 50  # variations, each of the last one, for one new candidate before it is given up


class EvolutionSettings(Section):
    """How candidates are varied and winnowed.

    Args:
        offspring: new candidates in a generation, measured at the smallest fidelity.
        survivors: how many of them go on to the second fidelity, the third, ...; None: a quarter of the
            previous number each time, at least one.
        parents: elites that each target keeps.
        crossover: probability that a new candidate mixes two elites; None: 0 with one parent, else 0.3.
        migration: probability that a parent is an elite of the next lower or higher target, repaired to
            this one.
        start: the first elites: the ``uniform`` candidates; or beside them the best of a generation of
            ``random`` ones; or beside them the solutions of ``sensitivity`` or ``greedy``.
        sensitivity: how these are found.
        greedy: likewise.
    """

    kind: Literal["evolution"] = "evolution"
    offspring: int = Field(default=16, ge=1)
    survivors: list[int] | None = None
    parents: int = Field(default=1, ge=1)
    crossover: float | None = Field(default=None, ge=0, le=1)
    migration: float = Field(default=0.2, ge=0, le=1)
    start: Literal["uniform", "random", "sensitivity", "greedy"] = "uniform"
    sensitivity: SensitivitySettings = SensitivitySettings()
    greedy: GreedySettings = GreedySettings()

    @model_validator(mode="after")
    def _check(self) -> EvolutionSettings:
        numbers = [self.offspring, *(self.survivors or [])]
        if numbers != sorted(numbers, reverse=True) or numbers[-1] < 1:
            raise ValueError(
                f"Expected `survivors` to descend from at most `offspring` ({self.offspring}) to at least 1, "
                f"got {self.survivors}."
            )
        return self

    @property
    def crossover_probability(self) -> float:
        return self.crossover if self.crossover is not None else 0.3 if self.parents > 1 else 0.0


class Evolution(Controller):
    """An elitist (mu + lambda) evolution for each target, targets taking turns.

    A generation: new candidates from the elites by mutation and crossover; all are measured at the smallest
    fidelity, the best at the next, and so on; those measured at the largest fidelity compete with the
    elites, which were measured there too. With one target and one parent this is EvoPress (arXiv
    2410.14649), but for: fixed, nested data in place of a fresh minibatch a stage, so that parent and
    offspring are compared on equal data and nothing is measured twice; and offspring that are all different
    and new.

    Asked while every generation under way waits for results, it begins another one from the elites of that moment:
    generations overlap as far as there are workers to keep busy, and follow each other where there is one.

    Args:
        space: what is searched.
        fidelities: ascending, of the part ``search``.
        seed: of all random choices; generation g draws from a generator of its own, seeded by (seed, g).
        settings: how candidates are varied and winnowed.
        objective: name of the value to minimise.

    Raises:
        ValueError: if the fidelities are out of order or don't fit `survivors`.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,
        settings: EvolutionSettings,
        objective: str = "loss",
    ) -> None:
        self._space = space
        self._fidelities = check_fidelities(fidelities)
        self._seed = seed
        self._settings = settings
        self._survivors = _survivors(settings, len(self._fidelities))
        self._solver = _solver(space, fidelities, seed, settings)
        self._elites: list[list[tuple[float, Any]]] = [[] for _ in space.targets]
        self._starts: list[tuple[int, Any]] | None = None  # (target, candidate), once they are known
        self._seen = {candidate.text for candidate in space.baselines().values()}
        self._generation = 0
        self._n_barren = 0  # generations in a row without a new candidate
        self._exhausted = False  # the elites of this moment have no new candidate
        self._batches = Batches(objective, self._start())

    def ask(self, n: int) -> list[Proposal]:
        proposals = self._batches.ask(n)
        while not proposals and not self._exhausted and self._begin_generation():
            proposals = self._batches.ask(n)
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        self._batches.tell(trials)
        self._exhausted = False

    @property
    def n_measurements(self) -> int:
        first = 0 if self._solver is None else self._solver.n_measurements
        return first + len(self._space.targets)

    @property
    def elites(self) -> tuple[tuple[Any, ...], ...]:
        """For each target its elites, best first."""
        return tuple(tuple(candidate for _, candidate in elites) for elites in self._elites)

    def _start(self) -> Course:
        """The first elites."""
        starts = [
            (b, c) for name, c in self._space.baselines().items() if (b := self._target(name, c)) is not None
        ]
        if self._solver is not None:
            yield from self._solver.run()
            solutions = self._solver.solutions.items()
            starts += [(target, candidate) for target, found in solutions for candidate in found]
        self._starts = starts
        losses = yield [Proposal(candidate, self._fidelities[-1]) for _, candidate in starts]
        for (target, candidate), loss in zip(starts, losses, strict=True):
            self._seen.add(candidate.text)
            self._keep(target, [(loss, candidate)])

    def _begin_generation(self) -> bool:
        """Open the next generation that has a new candidate; False if none has, now or for ever."""
        n_targets = len(self._elites)
        while self._starts is not None and self._n_barren < n_targets:
            target = self._generation % n_targets
            rng = np.random.default_rng((self._seed, self._generation))
            random = self._settings.start == "random" and self._generation < n_targets
            offspring = self._offspring(target, rng, random=random)
            if not offspring and self._batches.n_open:  # other elites may have some
                self._exhausted = True
                return False
            self._generation += 1
            self._n_barren = 0 if offspring else self._n_barren + 1
            if offspring:
                self._batches.open(self._winnow(target, offspring))
                return True
        return False

    def _target(self, name: str, candidate: Any) -> int | None:
        return None if name == "dense" else self._space.target_of(candidate)

    def _winnow(self, target: int, candidates: list[Any]) -> Course:
        """Successive halving; those that reach the largest fidelity compete with the elites."""
        ranked: list[tuple[float, Any]] = []
        for fidelity, n_next in zip(self._fidelities, (*self._survivors, 0), strict=True):
            losses = yield [Proposal(candidate, fidelity) for candidate in candidates]
            ranked = _ranked(zip(losses, candidates, strict=True))
            candidates = [candidate for loss, candidate in ranked[:n_next] if math.isfinite(loss)]
            if n_next and not candidates:
                return
        self._keep(target, ranked)

    def _keep(self, target: int, newcomers: list[tuple[float, Any]]) -> None:
        """Keep the best as elites; older ones win ties, and infeasible ones are never elites."""
        known = {candidate.text for _, candidate in self._elites[target]}
        new = [(x, c) for x, c in newcomers if math.isfinite(x) and c.text not in known]
        self._elites[target] = _ranked([*self._elites[target], *new])[: self._settings.parents]

    # --- offspring ---

    def _offspring(self, target: int, rng: np.random.Generator, *, random: bool) -> list[Any]:
        """New candidates of the target, all different; fewer, or none, where no more are found."""
        found = []
        for _ in range(self._settings.offspring):
            child = self._sample(target, rng) if random else self._vary(target, rng)
            for _ in range(ATTEMPTS):
                if child.text not in self._seen:
                    self._seen.add(child.text)
                    found.append(child)
                    break
                child = self._space.mutate(child, rng)
            else:
                break
        return found

    def _sample(self, target: int, rng: np.random.Generator) -> Any:
        return self._space.sample(rng, target)

    def _vary(self, target: int, rng: np.random.Generator) -> Any:
        """One variation of a random parent; a random candidate where there is none."""
        settings = self._settings
        elites = [candidate for _, candidate in self._elites[target]]
        if not elites and self._batches.n_open:  # the first of them are being measured
            elites = [candidate for b, candidate in self._starts or () if b == target]
        if not elites:
            return self._sample(target, rng)
        parent = elites[rng.integers(len(elites))]
        if rng.random() < settings.crossover_probability and len(elites) > 1:
            others = [candidate for candidate in elites if candidate is not parent]
            return self._space.crossover(parent, others[rng.integers(len(others))], rng)
        if rng.random() < settings.migration:
            parent = self._migrant(target, rng) or parent
        return self._space.mutate(parent, rng)

    def _migrant(self, target: int, rng: np.random.Generator) -> Any | None:
        """An elite of a neighbouring target, repaired to this one; None where there is none."""
        around = [b for b in (target - 1, target + 1) if 0 <= b < len(self._elites)]
        elites = [candidate for b in around for _, candidate in self._elites[b]]
        if not elites:
            return None
        return self._space.repair(elites[rng.integers(len(elites))], target, rng)


Solver = SensitivityCourse | GreedyCourse

# What finds the first elites, by the name of the start.
_SOLVERS: dict[str, Callable[[SeparableSpace[Any], Sequence[Fidelity], int, EvolutionSettings], Solver]] = {
    "sensitivity": lambda space, fidelities, seed, of: SensitivityCourse(space, fidelities, of.sensitivity),
    "greedy": lambda space, fidelities, seed, of: GreedyCourse(space, fidelities, seed, of.greedy),
}


def _solver(
    space: Space[Any], fidelities: Sequence[Fidelity], seed: int, settings: EvolutionSettings
) -> Solver | None:
    """What finds the first elites, if that takes measurements of its own."""
    if settings.start not in _SOLVERS:
        return None
    return _SOLVERS[settings.start](separable(space, f"start: {settings.start}"), fidelities, seed, settings)


def _ranked(pairs: Any) -> list[tuple[float, Any]]:
    """(loss, candidate) by loss, equal ones in the order given."""
    return sorted(pairs, key=lambda pair: pair[0])


def _survivors(settings: EvolutionSettings, n_fidelities: int) -> tuple[int, ...]:
    """How many candidates go on to the second fidelity, the third, ..."""
    if settings.survivors is None:
        return tuple(max(1, settings.offspring // 4**stage) for stage in range(1, n_fidelities))
    if len(settings.survivors) != n_fidelities - 1:
        raise ValueError(
            f"Expected one number in `survivors` for each fidelity after the first ({n_fidelities - 1}), "
            f"got {settings.survivors}."
        )
    return tuple(settings.survivors)
