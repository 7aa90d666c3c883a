"""The controller `evolution`: elites for each target, mutation and crossover, successive halving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from zlib import crc32

import numpy as np
from pydantic import Field, model_validator

from secateur.search.controller import Proposal, Trial
from secateur.search.controllers.generations import GenerationalController
from secateur.search.controllers.greedy import GreedyProcedure, GreedySettings
from secateur.search.controllers.local_model import LocalModel, curvature_fidelity
from secateur.search.controllers.procedure import Key, SearchProcedure, loss_of
from secateur.search.controllers.proxy_screening import MAX_UNMEASURED, Screening, ScreeningSettings, screened
from secateur.search.controllers.sensitivity import SensitivityProcedure, SensitivitySettings
from secateur.search.controllers.separable import check_separable
from secateur.search.controllers.trust_region import TrustRegionProcedure, TrustRegionSettings
from secateur.spaces.measurement import Effects, Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import Space


class EvolutionSettings(Section):
    """Settings of the controller `evolution`.

    Args:
        offspring: new candidates of a generation, measured at the smallest fidelity.
        survivors: numbers promoted to the second fidelity, the third, ...; None: a quarter of the previous number
            each time, at least one.
        parents: elites of each target.
        crossover: probability of a crossover of two elites; None: 0 with one parent, else 0.3.
        migration: probability of a parent from the next lower or higher target, repaired to this one.
        late: share of generations whose offspring differ from their parents behind a random depth of the model alone
            (`Space.mutate_after`): the blocks before it are computed once for all. Later blocks are varied more often.
        guided: mutations drawn for each offspring, of which the one with the smallest foretold loss is measured; above
            1 the gradient at each new elite is measured, too, for three times its tokens, and foretells the effect of
            every switch. With the settings of `trust_region`.
        screening: of offspring by the space's proxy for their loss; None: all are measured on data.
        start: the first elites: the ``uniform`` candidates alone, or also the best of a generation of ``random``
            ones, or also the solutions of ``sensitivity``, ``greedy`` or ``trust_region``.
        sensitivity, greedy, trust_region: settings of these.
    """

    kind: Literal["evolution"] = "evolution"
    offspring: int = Field(default=16, ge=1)
    survivors: list[int] | None = None
    parents: int = Field(default=1, ge=1)
    crossover: float | None = Field(default=None, ge=0, le=1)
    migration: float = Field(default=0.2, ge=0, le=1)
    late: float = Field(default=0.0, ge=0, le=1)
    guided: int = Field(default=1, ge=1)
    screening: ScreeningSettings | None = None
    start: Literal["uniform", "random", "sensitivity", "greedy", "trust_region"] = "uniform"
    sensitivity: SensitivitySettings = SensitivitySettings()
    greedy: GreedySettings = GreedySettings()
    trust_region: TrustRegionSettings = TrustRegionSettings()

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


class Evolution(GenerationalController):
    """Elitist (mu + lambda) evolution for each target in turn.

    A generation: new candidates from the elites by mutation and crossover; successive halving over the fidelities;
    the candidates measured at the largest fidelity compete with the elites, which were measured there too. With one
    target and one parent this is EvoPress (arXiv 2410.14649), with two differences: fixed, nested data in place of a
    fresh minibatch a stage, so that parent and offspring are compared on equal data and no candidate is measured
    twice; and offspring are distinct and new.

    If all open generations wait for results, `ask` begins another one from the present elites: generations overlap as
    far as there are idle workers, and are sequential with one worker.

    With `screening` many more offspring are made than are measured: the proxy chooses, see `Screening`.

    Args:
        proxy: a fidelity of the part ``proxy`` whose loss ranks candidates similarly to the objective; None: the space
            has none.

    Raises:
        ValueError: if the fidelities are out of order or don't fit `survivors`, or candidates are to be screened and
            there is no proxy.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,  # generation g has its own random generator, seeded by (seed, g)
        settings: EvolutionSettings,
        objective: str = "loss",
        *,
        proxy: Fidelity | None = None,
    ) -> None:
        of = settings
        if of.screening is not None and proxy is None:
            raise ValueError(
                "Expected a space with a proxy for `screening`, got none. Set `space.proxy`, or leave `screening` out."
            )
        super().__init__(space, fidelities, seed, of.offspring, of.survivors, of.parents, objective)
        self._settings = settings
        self._depth = 0.0  # of the blocks that the present generation shares
        self._target = 0  # of the present generation
        self._proxy = proxy
        self._screening = None if of.screening is None else Screening(of.screening)
        self._n_unmeasured = 0  # generations in a row
        self._foretold: dict[str, float] = {}  # by the proxy, of candidates that wait for their first loss
        self._solver = _solver(space, fidelities, seed, settings, self.effects)
        self._guides: dict[int, LocalModel] = {}  # by target, where offspring are guided
        if settings.guided > 1:
            self._gradient = curvature_fidelity(fidelities, settings.trust_region.n_tokens)
            separable = check_separable(space, "guided")
            self._guides = {target: LocalModel(separable) for target in range(len(space.targets))}
        self._open(self._start())

    @property
    def n_measurements(self) -> int:
        first = 0 if self._solver is None else self._solver.n_measurements
        return first + len(self._space.targets)

    def _start(self) -> SearchProcedure:
        """Find and measure the first elites."""
        starts, known = [], {}
        if self._solver is not None:
            yield from self._solver.run()
            solutions = self._solver.solutions.items()
            starts = [(target, candidate) for target, found in solutions for candidate in found]
        if isinstance(self._solver, TrustRegionProcedure):
            known = self._solver.losses
        yield from self._start_with(starts, known)
        for target in self._guides:
            yield from self._look(target)

    def _can_go_on(self) -> bool:
        """True during the trust region: once its gradients exceed the budget, generations spend the rest."""
        return self._starts is None and isinstance(self._solver, TrustRegionProcedure)

    def tell(self, trials: Sequence[Trial]) -> None:
        for measurement in (trial.measurement for trial in trials):
            first = measurement.fidelity == self._fidelities[0]
            foretold = self._foretold.pop(measurement.candidate, None) if first else None
            if self._screening is not None and foretold is not None and measurement.infeasible is None:
                self._screening.note(foretold, loss_of(measurement, self._objective))
        super().tell(trials)

    @property
    def notes(self) -> Mapping[str, float]:
        if self._screening is None:
            return super().notes
        found = self._screening.correlation
        notes = {"oversampling": round(self._screening.oversampling, 1)}
        return notes | ({} if found is None else {"rank_correlation": round(found, 3)})

    def _compete(self, target: int, candidates: list[Any]) -> SearchProcedure:
        if self._screening is not None and self._proxy is not None:
            rng = np.random.default_rng((self._seed, crc32(candidates[0].text.encode())))
            n = self._settings.offspring
            chosen = yield from screened(candidates, n, self._proxy, self._screening, rng)
            self._n_unmeasured = 0 if chosen else self._n_unmeasured + 1
            self._foretold |= {text: value for text, (value, _) in chosen.items()}
            candidates = [candidate for _, candidate in chosen.values()]
        yield from super()._compete(target, candidates)
        if target in self._guides:
            yield from self._look(target)

    def _look(self, target: int) -> SearchProcedure:
        """Measure the gradient at the target's best elite, once."""
        for _, elite in self._elites[target][:1]:
            proposal = Proposal(elite, self._gradient)
            if proposal.key not in self.effects:
                yield [proposal]
                if proposal.key in self.effects:
                    effects = self.effects[proposal.key]
                    self._guides[target].add(elite, self._gradient.n_tokens, effects)

    @property
    def _n_new(self) -> int:
        oversampling = 1.0 if self._screening is None else self._screening.oversampling
        return math.ceil(self._n_offspring * oversampling)

    def _offspring(self, target: int, rng: np.random.Generator) -> list[Any]:
        late, self._target = self._settings.late, target
        self._depth = rng.random() if late and rng.random() < late else 0.0
        if self._n_unmeasured >= MAX_UNMEASURED:
            return []
        return super()._offspring(target, rng)

    def _propose(self, target: int, rng: np.random.Generator, index: int) -> Any:
        if self._settings.start == "random" and self._generation < len(self._elites):
            return self._space.sample(rng, target)
        return self._vary(target, rng)

    def _mutate(self, candidate: Any, rng: np.random.Generator) -> Any:
        guide = self._guides.get(self._target)
        if guide is None or not guide.known:
            return self._mutated(candidate, rng)
        drawn = [self._mutated(candidate, rng) for _ in range(self._settings.guided)]
        return min(drawn, key=lambda child: guide.foretold(child, candidate))

    def _mutated(self, candidate: Any, rng: np.random.Generator) -> Any:
        if self._depth:
            return self._space.mutate_after(candidate, self._depth, rng)
        return super()._mutate(candidate, rng)

    def _vary(self, target: int, rng: np.random.Generator) -> Any:
        """Mutation or crossover of a random parent; a random candidate where there is none."""
        settings = self._settings
        elites = [candidate for _, candidate in self._elites[target]]
        if not elites and self._n_open:  # the first ones are being measured
            elites = [candidate for b, candidate in self._starts or () if b == target]
        if not elites:
            return self._space.sample(rng, target)
        parent = elites[rng.integers(len(elites))]
        if rng.random() < settings.crossover_probability and len(elites) > 1:
            others = [candidate for candidate in elites if candidate is not parent]
            return self._space.crossover(parent, others[rng.integers(len(others))], rng)
        if rng.random() < settings.migration:
            parent = self._migrant(target, rng) or parent
        return self._mutate(parent, rng)

    def _migrant(self, target: int, rng: np.random.Generator) -> Any | None:
        """An elite of a neighbouring target, repaired to this one; None where there is none."""
        around = [b for b in (target - 1, target + 1) if 0 <= b < len(self._elites)]
        elites = [candidate for b in around for _, candidate in self._elites[b]]
        if not elites:
            return None
        return self._space.repair(elites[rng.integers(len(elites))], target, rng)


def _solver(
    space: Space[Any],
    fidelities: Sequence[Fidelity],
    seed: int,
    settings: EvolutionSettings,
    effects: Mapping[Key, Effects],
) -> SensitivityProcedure | GreedyProcedure | TrustRegionProcedure | None:
    """Procedure that finds the first elites, if it takes measurements of its own."""
    if settings.start in {"uniform", "random"}:
        return None
    separable = check_separable(space, f"start: {settings.start}")
    if settings.start == "sensitivity":
        return SensitivityProcedure(separable, fidelities, settings.sensitivity, effects)
    if settings.start == "trust_region":
        return TrustRegionProcedure(separable, fidelities, settings.trust_region, effects)
    return GreedyProcedure(separable, fidelities, seed, settings.greedy)
