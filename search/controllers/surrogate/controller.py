"""The controller `surrogate`: exact minimisers of draws from a model of the loss that learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from secateur.search.controller import Proposal, Trial
from secateur.search.controllers.generations import GenerationalController
from secateur.search.controllers.knapsack import Array
from secateur.search.controllers.procedure import SearchProcedure, loss_of
from secateur.search.controllers.sensitivity import SensitivityProcedure, SensitivitySettings
from secateur.search.controllers.separable import check_separable, solve
from secateur.search.controllers.surrogate.features import Features, smooth_table
from secateur.search.controllers.surrogate.loss_model import LossModel
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import SeparableSpace, Space

SPREAD = 0.1  # of the prior, at first; see `Regression`
OVERLAP = 4  # open generations from which successive halving is too late for the best candidate


class SurrogateSettings(Section):
    """Settings of the controller `surrogate`.

    Args:
        prior: foretold losses of the slots that the model begins with: ``smooth``, in proportion to the slot's size
            and convex in the share that is removed, without a measurement; or those of ``sensitivity``, which with
            ``by: curvature`` takes one pass over the dense model.
        sensitivity: settings of the latter.
        offspring: new candidates of a generation, measured at the smallest fidelity.
        survivors: numbers promoted to the second fidelity, the third, ...; None: a quarter of the previous number
            each time, at least one.
    """

    kind: Literal["surrogate"] = "surrogate"
    prior: Literal["smooth", "sensitivity"] = "smooth"
    sensitivity: SensitivitySettings = SensitivitySettings()
    offspring: int = Field(default=16, ge=1)
    survivors: list[int] | None = None


class Surrogate(GenerationalController):
    """Thompson sampling with a linear model of the log-loss, refitted to all measurements of the study.

    The model foretells the log-loss of a candidate from its option in each slot, see `Features` and `LossModel`. A
    generation holds the candidate with the smallest expected loss and, for each other place, that of a draw from the
    posterior, half as far from its mean as is drawn: exact minimisers under the target, or with pair terms those for
    the neighbours of the last solution, so that any number of workers measures different, good candidates.
    Successive halving then selects by measurements alone. Candidates that are known are mutated, which also finds what
    the model can't tell. If many generations overlap, the candidate with the smallest expected loss is measured at the
    largest fidelity at once, since their results are far behind.

    Thompson sampling: Russo et al. (https://arxiv.org/abs/1707.02038); for combinatorial structures BOCS (Baptista and
    Poloczek, https://arxiv.org/abs/1806.08838), whose quadratic model has all pairs, a sparse prior, and a relaxation
    in place of the exact solution.

    When to use it: many workers, or no more than some hundred measurements. Where options of slots interact more than
    the terms of neighbours can tell, `evolution` may find more in the long run with one worker.

    Raises:
        ValueError: if the space is not separable, or the fidelities are out of order or don't fit the settings.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,  # generation g has its own random generator, seeded by (seed, g)
        settings: SurrogateSettings,
        objective: str = "loss",
    ) -> None:
        super().__init__(space, fidelities, seed, settings.offspring, settings.survivors, 1, objective)
        self._separable: SeparableSpace[Any] = check_separable(space, "surrogate")
        self._prior: SensitivityProcedure | None = None
        if settings.prior == "sensitivity":
            self._prior = SensitivityProcedure(
                self._separable, fidelities, settings.sensitivity, self.effects
            )
        self._model: LossModel | None = None  # until the prior is known
        self._told: list[Trial] = []  # until then
        self._open(self._start())

    @property
    def n_measurements(self) -> int:
        first = 0 if self._prior is None else self._prior.n_measurements
        return first + len(self._space.targets)

    def tell(self, trials: Sequence[Trial]) -> None:
        self._learn([trial for trial in trials if trial.measurement.key in self._waiting])
        super().tell(trials)

    def _start(self) -> SearchProcedure:
        """Find the prior, and measure its solutions."""
        if self._prior is not None:
            yield from self._prior.run()
        self._model = self._new_model()
        self._learn(self._told)
        solutions = {} if self._prior is None else self._prior.solutions
        starts = [(target, candidate) for target, found in solutions.items() for candidate in found]
        self._seen.update(candidate.text for _, candidate in starts)
        yield from self._start_with(starts)

    def _new_model(self) -> LossModel:
        """The model without evidence."""
        space, targets = self._separable, range(len(self._space.targets))
        measured = {} if self._prior is None else self._prior.foretold
        smooth = smooth_table(space)
        features, centers = {}, {}
        for target in targets:
            table, base = measured.get(target, (smooth, 0.0))
            center = solve(space, table, target)
            if center is None:
                continue
            options = space.disassemble(center)
            centers[target] = tuple(space.options(slot).index(option) for slot, option in enumerate(options))
            features[target] = Features(space, table, _whole(table, base, centers[target]), centers[target])
        return LossModel(space, features, len(self._fidelities), centers, SPREAD)

    def _learn(self, trials: Sequence[Trial]) -> None:
        if self._model is None:
            self._told += trials
            return
        for trial in trials:
            m = trial.measurement
            if m.fidelity in self._fidelities:
                candidate = self._space.parse(m.candidate)
                target = self._space.target_of(candidate)
                if target is not None:
                    fidelity = self._fidelities.index(m.fidelity)
                    self._model.learn(target, fidelity, candidate, loss_of(m, self._objective))

    def _propose(self, target: int, rng: np.random.Generator, index: int) -> Any:
        assert self._model is not None  # no generation before the start
        if index:
            return self._model.draw(target, rng)
        self._model.refit()
        best = self._model.best(target)
        if self._n_open < OVERLAP or best.text in self._seen:
            return best
        self._seen.add(best.text)
        self._open(self._measure(target, best))
        return self._model.draw(target, rng)

    def _measure(self, target: int, candidate: Any) -> SearchProcedure:
        """Measure a candidate at the largest fidelity at once."""
        losses = yield [Proposal(candidate, self._fidelities[-1])]
        self._keep(target, [(losses[0], candidate)])


def _whole(table: Sequence[Array], base: float, positions: Sequence[int]) -> float:
    """Foretold loss of a candidate, > 0."""
    of_slots = sum(float(row[i]) for row, i in zip(table, positions, strict=True))
    return max(base + of_slots, 1e-9)
