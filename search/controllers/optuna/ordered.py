"""Ordered parameters of a conditional space, proposed by a sampler without support for conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.search.controllers.optuna.samplers import build_sampler, distribution_of
from secateur.spaces.space import IntParameter

if TYPE_CHECKING:  # takes a second to import
    import optuna


class OrderedParameters:
    """Joint replacement of the ordered values that another sampler proposed.

    A Gaussian process can't be fitted on a conditional space. It can on the trials that hold all ordered parameters of
    the present one: each proposal makes a sampler with these trials and parameters alone. Other parameters, such as
    the metric, count as noise.

    Stateless: a proposal depends only on the study's trials, the seed and the trial's number. The arguments are those
    of `build_sampler`; the sampler proposes nothing while it has too few trials.
    """

    def __init__(
        self, sampler: str, options: Mapping[str, Any], seed: int, parameters: Sequence[IntParameter]
    ) -> None:
        self._sampler = sampler
        self._options = dict(options)
        self._seed = seed
        free = [replace(p, when=()) for p in parameters if not p.categorical and p.low < p.high]
        self._parameters = {p.name: p for p in free}
        build_sampler(sampler, options, seed, free)  # raises for options it does not take

    def __len__(self) -> int:
        return len(self._parameters)

    def proposed(self, trial: optuna.Trial, values: Mapping[str, int]) -> dict[str, int]:
        """New values of a trial's ordered parameters; none if too few trials were measured."""
        import optuna

        together = [p for name, p in self._parameters.items() if name in values]
        if not together:
            return {}
        distributions = {p.name: distribution_of(p) for p in together}
        seed = int(np.random.default_rng((self._seed, trial.number)).integers(2**31))
        alone = optuna.create_study(
            sampler=build_sampler(self._sampler, self._options, seed, together),
            directions=trial.study.directions,
        )
        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING)
        for other in trial.study.get_trials(deepcopy=False, states=states):
            if other.number != trial.number and distributions.keys() <= other.params.keys():
                alone.add_trial(
                    optuna.trial.create_trial(
                        state=other.state,
                        params={name: other.params[name] for name in distributions},
                        distributions=distributions,
                        values=other.values,
                    )
                )
        return dict(alone.ask().relative_params)
