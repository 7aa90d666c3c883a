"""The controller `optuna`: samplers of Optuna, and third-party ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, field_validator, model_validator

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.controllers.optuna.samplers import SAMPLERS, check_name, row_of
from secateur.search.controllers.optuna.study import SampledStudy
from secateur.search.controllers.procedure import check_fidelities
from secateur.search.controllers.warm_start import front_of
from secateur.search.objectives import objective
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import Space

if TYPE_CHECKING:  # takes a second to import
    import optuna

FAILURES = 3  # known proposals a target in a row before the space counts as exhausted


class OptunaSettings(Section):
    """Settings of the controller `optuna`.

    Args:
        sampler: ``tpe``, ``nsga2``, ``nsga3``, ``gp``, ``cmaes``, ``random``, or the dotted name of a subclass of
            ``optuna.samplers.BaseSampler``. ``gp`` takes seconds a proposal beyond some 15 parameters or 200
            trials; ``cmaes`` takes one objective.
        objectives: to optimise; None: those of the search, of which ``cmaes`` takes the first.
        options: keyword arguments of the sampler, e.g. ``{population_size: 20}``.
        start: number of random candidates from the space itself, after the uniform ones: better than a sampler's,
            which ignores the target.
        warm_start: directory of a run whose front is proposed first.
    """

    kind: Literal["optuna"] = "optuna"
    sampler: Annotated[str, AfterValidator(check_name)] = "tpe"
    objectives: tuple[str, ...] | None = None
    options: dict[str, Any] = Field(default={})
    start: int = Field(default=16, ge=0)
    warm_start: Path | None = None

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            objective(name)  # raises for an unknown one
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
    """Sampler of Optuna over the space's parameters, repaired to candidates that meet a target.

    With one objective each target has its own study and sampler, in turn, since a milder target would win every
    comparison. With several objectives there is one study, with the target as a parameter. All measurements are at
    the largest fidelity; for successive halving use `evolution`. Results may arrive in any order, or not at all.

    Conditional parameters (the space `recipe`): ``tpe`` proposes jointly those that apply together. ``gp`` takes TPE's
    values, and a Gaussian process, fitted on the trials that hold the same ordered parameters, replaces the ordered
    ones; with fewer such trials than its option ``n_startup_trials`` (10) TPE's values remain. Other samplers propose
    the unconditional parameters jointly (``cmaes`` only ordered ones) and draw the rest at random.

    Optuna's study is kept in memory; a resumed search rebuilds it by replay. Samplers have random generators of their
    own, seeded by the seed.

    When to use it: several objectives, or few slots. Samplers ignore targets: the repair changes about as many slots
    as the proposal misses by, so that single steps, which `evolution` relies on, are rare. On quadratic test functions
    with a known optimum evolution came nearer than any sampler, with 6 slots and with 21
    (experiments/002-scale/samplers.py).

    Raises:
        ValueError: if the fidelities are out of order, the sampler is unknown or does not take the options, or
            `warm_start` has no candidates of this space.
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
            for target, candidate in {c.text: (b, c) for b, c in [*known, *random] if b in group}.values():
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
            if (waiting := self._waiting.pop(trial.measurement.key, None)) is not None:
                study, asked = waiting
                study.tell(asked, trial)

    @property
    def n_measurements(self) -> int:
        return len(self._space.targets)

    def _warn(self, what: str) -> None:
        """Warn once that the sampler is slow at this size."""
        slow = "takes seconds a proposal. Consider tpe, cmaes or nsga2"
        warnings.warn(f"The sampler {self._sampler} with {what} {slow}.", UserWarning, stacklevel=3)


def _is_reached(space: Space[Any], candidate: Any, target: int) -> bool:
    """True if parameters reproduce the candidate; not all candidates are within a sampler's options."""
    rng = np.random.default_rng(0)
    return bool(space.from_parameters(space.to_parameters(candidate), target, rng) == candidate)
