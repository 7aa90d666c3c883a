"""The controller `optuna`: Optuna's samplers, and anybody's that work with Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.controllers.batches import check_fidelities
from secateur.search.controllers.optuna.samplers import SAMPLERS, check_name, row_of
from secateur.search.controllers.optuna.study import SampledStudy
from secateur.search.controllers.warm_start import front_of
from secateur.search.objectives import objective
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import Space

if TYPE_CHECKING:  # takes a second to import
    import optuna

FAILURES = 3  # proposals a target in a row without anything new before the space is taken to be exhausted


class OptunaSettings(Section):
    """Which sampler, and what it starts from.

    Args:
        sampler: ``tpe``, ``nsga2``, ``nsga3``, ``gp``, ``cmaes``, ``random``, or the dotted name of a subclass of
            ``optuna.samplers.BaseSampler``. ``gp`` takes seconds a proposal from some 15 parameters or 200 trials
            on; ``cmaes`` takes one objective.
        objectives: what it optimises; None: those of the search, of which ``cmaes`` takes the first.
        options: keyword arguments of the sampler, e.g. ``{population_size: 20}``.
        start: how many random candidates of the space's own a study begins with, after the uniform ones: better
            than a sampler's, which don't know the target.
        warm_start: directory of a run whose front is proposed before these.
    """

    kind: Literal["optuna"] = "optuna"
    sampler: str = "tpe"
    objectives: tuple[str, ...] | None = None
    options: dict[str, Any] = Field(default={})
    start: int = Field(default=16, ge=0)
    warm_start: Path | None = None

    @field_validator("sampler")
    @classmethod
    def _check_sampler(cls, name: str) -> str:
        return check_name(name)

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            objective(name)  # refuses an unknown one
        if names is not None and (not names or len(set(names)) < len(names)):
            raise ValueError(f"Expected `objectives` to name some, each once, got {list(names)}.")
        return names

    @model_validator(mode="after")
    def _check(self) -> OptunaSettings:
        if len(self.objectives or ()) > 1 and not row_of(self.sampler).multi_objective:
            able = ", ".join(name for name, row in SAMPLERS.items() if row.multi_objective)
            raise ValueError(
                f"Expected one of `objectives` for the sampler {self.sampler}, got {list(self.objectives or ())}. "
                f"Those that take several are {able}."
            )
        return self


class Optuna(Controller):
    """Asks a sampler of Optuna's for parameters and makes candidates of them that meet a target.

    With one objective each target has a study and a sampler of its own, and they take turns, since a milder
    target would win every comparison. With several there is one study, and the target is a parameter in it.
    All is measured at the largest fidelity: smaller ones are for controllers that winnow, as `evolution` does. Nothing
    is waited for: results may come in any order, or not at all.

    Of parameters that apply under conditions (the space `recipe`) ``tpe`` proposes those together that apply together.
    With ``gp`` it does so, too, and then a Gaussian process proposes the ordered ones of them anew, fitted on the
    trials that hold all of these; while they are fewer than its option ``n_startup_trials`` (10), TPE's values stay.
    The others propose those that always apply, ``cmaes`` only ordered ones of these, and draw the rest at random.

    Optuna's study lives in memory; after a stop it is rebuilt by replay. Samplers draw from generators of their own
    that begin with the seed.

    When to use it: several objectives, or few slots. A sampler knows no target: repair moves up to as many slots
    as the proposal was off, so single steps, which `evolution` lives on, are rare. On bowls with a known optimum
    evolution came nearer than any sampler, with 6 slots and with 21 (experiments/002-scale/samplers.py).

    Args:
        space: what is searched.
        fidelities: ascending, of the part ``search``.
        seed: of all random choices.
        settings: the sampler.
        objectives: of the search, names in `OBJECTIVES`.

    Raises:
        ValueError: if the fidelities are out of order, there is no such sampler, it does not take the options,
            or there is nothing to start from in `warm_start`.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,
        settings: OptunaSettings,
        objectives: Sequence[str] = ("loss",),
    ) -> None:
        self._space = space
        self._largest = check_fidelities(fidelities)[-1]
        self._sampler, self._row = settings.sampler, row_of(settings.sampler)
        names = settings.objectives or tuple(objectives)[: None if self._row.multi_objective else 1]
        targets = range(len(space.targets))
        groups = [tuple(targets)] if len(names) > 1 else [(target,) for target in targets]
        known = [] if settings.warm_start is None else front_of(settings.warm_start, space)
        known += [(b, c) for c in space.baselines().values() if (b := space.target_of(c)) is not None]
        known = [(b, c) for b, c in known if _is_reached(space, c, b)]
        self._studies = []
        for i, group in enumerate(groups):
            rng = np.random.default_rng((seed, i))
            study_seed = int(rng.integers(2**31))
            study = SampledStudy(space, group, names, settings.sampler, settings.options, study_seed)
            turns = [group[turn % len(group)] for turn in range(settings.start)]
            random = [(target, space.sample(rng, target)) for target in turns]
            starts = {c.text: (b, c) for b, c in [*known, *random] if b in group}
            for target, candidate in starts.values():
                study.start_with(candidate, target)
            self._studies.append(study)
        if self._row.comfort and self._studies[0].n_parameters > self._row.comfort[0]:
            self._warn(f"{self._studies[0].n_parameters} parameters")
        self._turn = 0
        self._seen: set[str] = set()
        self._waiting: dict[tuple[str, str], tuple[SampledStudy, optuna.Trial]] = {}

    def ask(self, n: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        n_before, n_failed = len(self._seen), 0
        while len(proposals) < n and n_failed < FAILURES * len(self._space.targets):
            study = self._studies[self._turn % len(self._studies)]
            self._turn += 1
            found = study.ask(lambda candidate: candidate.text not in self._seen)
            if found is None:
                n_failed += 1
                continue
            n_failed = 0
            asked, candidate = found
            proposal = Proposal(candidate, self._largest)
            self._seen.add(candidate.text)
            self._waiting[proposal.key] = study, asked
            proposals.append(proposal)
        if self._row.comfort and n_before <= self._row.comfort[1] < len(self._seen):
            self._warn(f"more than {self._row.comfort[1]} trials")
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            study, asked = self._waiting.pop(trial.measurement.key, (None, None))
            if study is not None and asked is not None:
                study.tell(asked, trial)

    @property
    def n_measurements(self) -> int:
        return len(self._space.targets)

    def _warn(self, what: str) -> None:
        """Say once that the sampler was not made for this."""
        slow = "takes seconds a proposal. Consider tpe, cmaes or nsga2"
        warnings.warn(f"The sampler {self._sampler} with {what} {slow}.", UserWarning, stacklevel=3)


def _is_reached(space: Space[Any], candidate: Any, target: int) -> bool:
    """Whether parameters lead to the candidate: what a study begins with may be none of a sampler's options."""
    rng = np.random.default_rng(0)
    return bool(space.from_parameters(space.to_parameters(candidate), target, rng) == candidate)
