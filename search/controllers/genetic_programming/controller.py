"""The controller `genetic`: genetic programming over formulas, with proxy screening and islands."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from secateur.search.controller import Proposal, Trial
from secateur.search.controllers.genetic_programming.cma_es import ConstantsTuner
from secateur.search.controllers.genetic_programming.mutation_crossover import NewFormulas
from secateur.search.controllers.genetic_programming.population import Individual, Population, at
from secateur.search.controllers.genetic_programming.settings import ConstantsSettings, GeneticSettings
from secateur.search.controllers.procedure import (
    Losses,
    ProcedureController,
    SearchProcedure,
    check_fidelities,
)
from secateur.search.controllers.proxy_screening import MAX_UNMEASURED, Screening
from secateur.spaces.formulas.space import Formula, FormulaSpace
from secateur.spaces.measurement import Fidelity
from secateur.spaces.space import Space

MOST_ISLANDS = 4
"""Largest number of islands by default."""

Measuring = Generator[list[Proposal], Losses, list[Individual]]
"""Part of a search procedure that returns the individuals it has measured."""


class Genetic(ProcedureController):
    """Genetic programming: expression trees, proxy screening, successive halving, selection by loss and size.

    A generation of an island: new formulas by crossover and mutation of its population (random ones at first, by
    ramped half-and-half), many more than are measured on data. All are measured by the proxy, at no cost to the
    budget. The best by (proxy, nodes) in comparison with the population, and a few random others, are measured at the
    smallest fidelity, the best of these at the next, and so on. Then they compete for a place in the population.
    Without a proxy only as many formulas are made as are measured.

    Formulas with bit-identical losses at their first measurement prune alike: only the smallest is kept.

    After Pruner-Zero (arXiv 2406.02924), which describes tournaments, subtree crossover and node mutation. New here:
    the proxy, monitored by its rank correlation with the loss; successive halving; size as a second objective; islands
    in a ring; constants tuned by CMA-ES.

    If all open generations wait for results, `ask` begins another one, on the next island: generations overlap as far
    as there are idle workers, and islands do not wait for each other.

    Args:
        space: of formulas.
        fidelities: ascending, of the part ``search``.
        seed: generation g of island i has its own random generator, seeded by (seed, i, g).
        settings: see `GeneticSettings`.
        objective: name of the value to minimise.
        proxy: a fidelity of the part ``proxy`` whose value of the same name ranks formulas similarly to the objective;
            None: no screening.
        n_workers: measuring at the same time; sets the number of islands.

    Raises:
        ValueError: if the space is not one of formulas, or the fidelities are out of order.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,
        settings: GeneticSettings,
        objective: str = "loss",
        *,
        proxy: Fidelity | None = None,
        n_workers: int = 1,
    ) -> None:
        super().__init__(objective)
        if not isinstance(space, FormulaSpace):
            raise ValueError(
                "Expected a space of formulas for the controller `genetic`, got another one. "
                "Use space.kind: formula, or the controller `evolution`."
            )
        self._space = space
        self._fidelities = check_fidelities(fidelities)
        self._proxy = proxy
        self._seed = seed
        self._settings = settings
        n_islands = settings.islands or min(MOST_ISLANDS, n_workers)
        self._islands = [Population(settings, len(self._fidelities)) for _ in range(n_islands)]
        self._new = NewFormulas(space, settings)
        self._screening = Screening(settings)
        self._smallest: dict[float, int] = {}  # size of the smallest formula by its first loss
        self._tuned: set[str] = set()
        self._counts = dict.fromkeys(("alike", "infeasible", "screened", "measured", "tuned", "migrated"), 0)
        self._turn = 0
        self._n_unmeasured = 0
        if settings.seeds:
            self._open(self._measure_seeds())

    def tell(self, trials: Sequence[Trial]) -> None:
        told = [trial.measurement.fidelity for trial in trials]
        self._counts["screened"] += 0 if self._proxy is None else told.count(self._proxy)
        self._counts["measured"] += told.count(self._fidelities[0])
        super().tell(trials)

    @property
    def notes(self) -> Mapping[str, float]:
        counts, correlation = self._counts, self._screening.correlation
        notes: dict[str, float] = {
            "generated": self._new.n_made,
            "duplicates": self._new.n_repeated + counts["alike"],
            "infeasible": counts["infeasible"],
        }
        if self._proxy is not None:
            notes |= {"screened": counts["screened"], "oversampling": round(self._screening.oversampling, 1)}
            notes |= {} if correlation is None else {"rank_correlation": round(correlation, 3)}
        notes |= {"measured": counts["measured"], "tuned": counts["tuned"]}
        return notes | ({"migrated": counts["migrated"]} if len(self._islands) > 1 else {})

    @property
    def populations(self) -> tuple[tuple[Individual, ...], ...]:
        """Members of each island, best first."""
        return tuple(tuple(island.members) for island in self._islands)

    # --- generations ---

    def _begin(self) -> bool:
        """Open the next generation with a new formula."""
        for _ in self._islands:
            if self._n_unmeasured >= MAX_UNMEASURED:
                break
            generation, i = divmod(self._turn, len(self._islands))
            island, rng = self._islands[i], np.random.default_rng((self._seed, i, generation))
            self._migrate(i, generation)
            n = self._settings.offspring if generation else self._settings.start
            formulas = self._new_formulas(island, generation, n, rng)
            if formulas:
                self._turn += 1
                self._open(self._generation(island, formulas, n, rng))
                tuning = self._settings.constants
                if tuning is not None and generation % tuning.every == tuning.every - 1:
                    rng = np.random.default_rng((self._seed, i, generation, 1))
                    self._open(self._tune(island, tuning, rng))
                return True
            if self._n_open:  # pending results may lead to new ones
                break
            self._turn += 1
        return False

    def _new_formulas(
        self, island: Population, generation: int, n: int, rng: np.random.Generator
    ) -> list[Formula]:
        """New formulas, enough to measure `n` after screening."""
        if self._proxy is not None:
            n = math.ceil(n * self._screening.oversampling)
        if generation == 0 or not island.members:
            return self._new.random(n, rng)
        return self._new.offspring(island, n, rng)

    def _migrate(self, i: int, generation: int) -> None:
        """Copy the present elites of the previous island in the ring."""
        settings, island = self._settings, self._islands[i]
        if len(self._islands) == 1 or not generation or generation % settings.migrate_every:
            return
        here = {x.formula.text for x in island.members}
        migrants = [x for x in self._islands[i - 1].elites[: settings.migrants] if x.formula.text not in here]
        self._counts["migrated"] += len(migrants)
        island.put(migrants)

    def _measure_seeds(self) -> SearchProcedure:
        """Measure the published formulas at all fidelities, and add them to every island."""
        space = self._space
        formulas = [c for c in space.baselines().values() if space.target_of(c) is not None]
        for formula in formulas:
            self._new.is_new(formula)
        seeds = yield from self._screen(formulas)
        for level in range(len(self._fidelities)):
            seeds = yield from self._measure(seeds, level)
        for island in self._islands:
            island.put(seeds)

    def _generation(
        self, island: Population, formulas: Sequence[Formula], n: int, rng: np.random.Generator
    ) -> SearchProcedure:
        """Screen new formulas and measure `n` of them."""
        going = yield from self._screen(formulas)
        if self._proxy is not None:
            going = self._screening.choose(island.best(going, lambda x: x.proxy), n, rng)
        self._n_unmeasured = 0 if going else self._n_unmeasured + 1
        yield from self._promote(island, going, 0)

    def _promote(self, island: Population, going: list[Individual], level: int) -> SearchProcedure:
        """Successive halving from this fidelity on; all measured formulas compete for the population."""
        for each in range(level, len(self._fidelities)):
            if each > 0:
                n = max(1, round(self._settings.promoted * len(going)))
                going = island.best(going, at(each - 1))[:n]
            going = yield from self._measure(going, each)
            if not going:
                return
            island.put(going)

    def _tune(
        self, island: Population, settings: ConstantsSettings, rng: np.random.Generator
    ) -> SearchProcedure:
        """Tune the constants of the best formulas with constants, at the smallest fidelity."""
        untuned = [x for x in island.members if x.formula.text not in self._tuned]
        for parent in [x for x in untuned if self._space.constants(x.formula)][: settings.trees]:
            tuner, best = ConstantsTuner(self._space, parent.formula, settings, rng), parent
            self._tuned.add(parent.formula.text)
            for _ in range(settings.steps):
                step = [self._individual(formula) for formula in tuner.ask(self._new.is_new)]
                if not step:
                    break
                found = yield [Proposal(x.formula, self._fidelities[0]) for x in step]
                tuner.tell(found)
                self._counts["tuned"] += len(found)
                best = min([best, *(x.measured(y) for x, y in zip(step, found, strict=True))], key=at(0))
            if best is not parent:
                self._tuned.add(best.formula.text)
                island.put([best])
                yield from self._promote(island, [best], 1)

    # --- results ---

    def _individual(self, formula: Formula) -> Individual:
        return Individual(formula, int(self._space.cost(formula)["nodes"]))

    def _screen(self, formulas: Sequence[Formula]) -> Measuring:
        """The formulas as individuals, with distinct values of the proxy if there is one."""
        individuals = [self._individual(formula) for formula in formulas]
        if self._proxy is None:
            return individuals
        found = yield [Proposal(formula, self._proxy) for formula in formulas]
        return [replace(x, proxy=loss) for x, loss in self._distinct(individuals, found)]

    def _measure(self, individuals: Sequence[Individual], level: int) -> Measuring:
        """Feasible individuals with their losses at a fidelity."""
        found = yield [Proposal(x.formula, self._fidelities[level]) for x in individuals]
        if level == 0 and self._proxy is None:
            pairs = self._distinct(individuals, found)
        else:
            pairs = [pair for pair in zip(individuals, found, strict=True) if math.isfinite(pair[1])]
            self._counts["infeasible"] += len(found) - len(pairs)
        for x, loss in pairs:
            if level == 0 and x.proxy is not None:
                self._screening.note(x.proxy, loss)
        return [x.measured(loss) for x, loss in pairs]

    def _distinct(self, individuals: Sequence[Individual], found: Losses) -> list[tuple[Individual, float]]:
        """Feasible individuals with new losses; of those with equal losses the smallest."""
        kept = []
        for x, loss in sorted(zip(individuals, found, strict=True), key=lambda pair: pair[0].nodes):
            if not math.isfinite(loss):
                self._counts["infeasible"] += 1
            elif x.nodes >= self._smallest.get(loss, x.nodes + 1):
                self._counts["alike"] += 1
            else:
                self._smallest[loss] = x.nodes
                kept.append((x, loss))
        return kept
