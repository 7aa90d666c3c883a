"""Optuna study in memory: values proposed by a sampler, turned into candidates by the space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.search.controller import Trial
from secateur.search.controllers.optuna.ordered import OrderedParameters
from secateur.search.controllers.optuna.samplers import build_sampler, distribution_of, quiet_optuna, row_of
from secateur.search.objectives import oriented
from secateur.spaces.space import IntParameter, Space

if TYPE_CHECKING:  # takes a second to import
    import optuna

ATTEMPTS = 50  # mutations in a row for one new candidate
TARGET = "budget"  # name of the parameter for one of several targets; as in stored studies
INFEASIBLE = "infeasible"  # name of the constraint that infeasible candidates violate


class SampledStudy:
    """Optuna study over one or more targets of a space.

    A proposal rarely meets a target. It is repaired, or mutated if it was proposed before, and the trial's parameters
    are replaced by those of the resulting candidate, so that the sampler learns from the measured one. Pending trials
    remain unfinished with their parameters: TPE and GP avoid them, other samplers ignore them.

    Conditional parameters are suggested one after another, each only where it applies, so that a trial holds no
    others. A sampler without support for them may replace the ordered ones alone, see `SamplerRow.after`.

    Args:
        space: of the search.
        targets: indices of targets; several are a parameter of their own.
        objectives: names in `OBJECTIVES`; all are minimised, after `oriented`.
        sampler, options: see `build_sampler`.
        seed: of the sampler and of the repairs, the latter together with the trial's number.
    """

    def __init__(
        self,
        space: Space[Any],
        targets: Sequence[int],
        objectives: Sequence[str],
        sampler: str,
        options: Mapping[str, Any],
        seed: int,
    ) -> None:
        self._optuna = quiet_optuna()
        self._states = self._optuna.trial.TrialState
        self._space = space
        self._targets = tuple(targets)
        self._objectives = tuple(objectives)
        self._seed = seed
        target = [IntParameter(TARGET, 0, len(targets) - 1)] if len(targets) > 1 else []
        self._parameters = (*space.parameters(), *target)
        self._distributions = {p.name: distribution_of(p) for p in self._parameters}
        self._ordered: OrderedParameters | None = None
        if row_of(sampler).after and any(p.when for p in self._parameters):
            self._ordered = OrderedParameters(sampler, options, seed, self._parameters)
            sampler, options = row_of(sampler).after, {}
        self._constrained = row_of(sampler).constrained
        self._storage = self._optuna.storages.InMemoryStorage()
        self._study = self._optuna.create_study(
            storage=self._storage,
            sampler=build_sampler(sampler, options, seed, self._parameters),
            directions=["minimize"] * len(objectives),
        )
        self._id = self._storage.get_study_id_from_name(self._study.study_name)
        self._worst: list[float] | None = None  # in each objective

    @property
    def n_parameters(self) -> int:
        """Number of parameters the sampler may propose."""
        return len(self._parameters if self._ordered is None else self._ordered)

    def start_with(self, candidate: Any, target: int) -> None:
        """Propose this candidate before those of the sampler."""
        self._study.enqueue_trial(self._values(candidate, target))

    def ask(self, is_new: Callable[[Any], bool]) -> tuple[optuna.Trial, Any] | None:
        """A trial and its new candidate, or None if no new one was found."""
        ordered = None if self._ordered is None or self._begins else self._ordered
        trial = self._study.ask()
        suggested = self._suggested(trial)
        values = {**suggested, **({} if ordered is None else ordered.proposed(trial, suggested))}
        rng = np.random.default_rng((self._seed, trial.number))
        target = self._targets[values.get(TARGET, 0)]
        candidate = self._space.from_parameters(values, target, rng)
        for _ in range(ATTEMPTS):
            if is_new(candidate):
                return self._corrected(trial, suggested, self._values(candidate, target)), candidate
            last, candidate = candidate, self._space.mutate(candidate, rng)
            if candidate.text == last.text:  # no neighbours
                break
        self._study.tell(trial, state=self._states.FAIL)
        return None

    def tell(self, asked: optuna.Trial, measured: Trial) -> None:
        """Tell the result of a trial.

        An infeasible candidate is told as the worst value so far, and violates a constraint if the sampler supports
        constraints. If it is the first result, the trial fails.

        Raises:
            ValueError: if the measurement lacks an objective.
        """
        if measured.measurement.infeasible is None:
            values = list(oriented(measured, self._objectives, rounded=True))
            self._worst = [max(pair) for pair in zip(values, self._worst or values, strict=True)]
            self._study.tell(asked, values)
        elif self._worst is None:
            self._study.tell(asked, state=self._states.FAIL)
        else:
            if self._constrained:
                asked.set_constraint(INFEASIBLE, 1.0)
            self._study.tell(asked, self._worst)

    @property
    def _begins(self) -> bool:
        """True if the next trial is one of the enqueued ones, which are measured unchanged."""
        return bool(self._study.get_trials(deepcopy=False, states=(self._states.WAITING,)))

    def _suggested(self, trial: optuna.Trial) -> dict[str, int]:
        """The sampler's values of the applicable parameters."""
        values: dict[str, int] = {}
        for p in self._parameters:
            if p.applies(values) and p.categorical:
                values[p.name] = trial.suggest_categorical(p.name, range(p.low, p.high + 1))
            elif p.applies(values):
                values[p.name] = trial.suggest_int(p.name, p.low, p.high)
        return values

    def _values(self, candidate: Any, target: int) -> dict[str, int]:
        values = self._space.to_parameters(candidate)
        return {**values, TARGET: self._targets.index(target)} if len(self._targets) > 1 else values

    def _corrected(self, trial: optuna.Trial, old: Mapping[str, int], new: Mapping[str, int]) -> optuna.Trial:
        """The trial with the parameters of its candidate; a new trial if some old parameters don't apply."""
        if not old.keys() <= new.keys():
            return self._replaced(trial, new)
        number = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
        for name, value in new.items():
            if value != old.get(name):
                distribution = self._distributions[name]
                internal = distribution.to_internal_repr(value)
                self._storage.set_trial_param(number, name, internal, distribution)
        return trial

    def _replaced(self, trial: optuna.Trial, values: Mapping[str, int]) -> optuna.Trial:
        """A new trial with these parameters; the old one fails, since parameters can't be removed from it."""
        self._study.tell(trial, state=self._states.FAIL)
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=self._states.RUNNING,
                params=dict(values),
                distributions={name: self._distributions[name] for name in values},
            )
        )
        number = self._storage.get_n_trials(self._id) - 1
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        replaced: optuna.Trial = self._optuna.Trial(self._study, trial_id)
        return replaced
