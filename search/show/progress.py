"""How far a search is, folded from its trials as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from secateur.search.budget import Spent
from secateur.search.controller import Trial
from secateur.search.results.course import best_by_target, references, target_sparsities
from secateur.search.results.front import hypervolume_series, non_dominated
from secateur.search.settings.settings import Settings
from secateur.search.study.study import trials_of


class Progress:
    """Counts, front, hypervolume and best losses; a few new trials cost little, however many there were.

    Args:
        settings: of the search.
        baselines: canonical texts of the baselines by name.
    """

    def __init__(self, settings: Settings, baselines: Mapping[str, str]) -> None:
        self.settings = settings
        self.spent = Spent()  # on the search
        self._names = {text: name for name, text in baselines.items()}
        self._fidelity = settings.evaluator.compared
        self._measured: Counter[str] = Counter()  # by fidelity
        self._infeasible: Counter[str] = Counter()  # by reason
        self._baselines: dict[str, Trial] = {}  # feasible, by name
        self._shown: list[Trial] = []  # feasible, at the fidelity that is compared
        self._front: list[Trial] = []
        self._targets: dict[str, float] = {}  # as far as their baselines are known
        self._best: dict[str, Trial] = {}  # by target

    def add(self, trials: Iterable[Trial]) -> None:
        """Trials that are new, in the order of their numbers."""
        trials = list(trials)
        self.spent = self.spent.plus(trials_of(trials, "search", "proxy"))
        self._measured.update(t.measurement.fidelity.text for t in trials)
        self._infeasible.update(t.measurement.infeasible for t in trials if t.measurement.infeasible)
        shown = [
            t for t in trials if t.measurement.fidelity == self._fidelity and not t.measurement.infeasible
        ]
        for trial in shown:
            name = self._names.get(trial.measurement.candidate)
            if name is not None:
                self._baselines[name] = trial
        order = [name for name in self._names.values() if name in self._baselines]
        self._baselines = {name: self._baselines[name] for name in order}
        self._shown += shown
        self._front = non_dominated([*self._front, *shown], self.settings.objectives, self._fidelity)
        known = target_sparsities(self._baselines)
        if known == self._targets:
            self._best = best_by_target([*self._best.values(), *shown], known)
        else:  # a trial before its baseline had no target yet
            self._targets, self._best = known, best_by_target(self._shown, known)

    @property
    def n_front(self) -> int:
        """Trials on the front so far."""
        return len(self._front)

    @property
    def infeasible(self) -> dict[str, int]:
        """Counts of infeasible candidates by reason."""
        return dict(self._infeasible)

    def facts(self) -> dict[str, Any]:
        """Plain values for programs."""
        return {
            "measurements": dict(self._measured),
            "infeasible": dict(self._infeasible),
            "spent": asdict(self.spent),
            "budget": self.settings.budget.model_dump(exclude_none=True),
            "used": min(1.0, self.settings.budget.share(self.spent)),
            "front": self.n_front,
            "hypervolume": self.hypervolume(),
            "best": self.best(),
        }

    def best(self) -> dict[str, dict[str, Any]]:
        """The trial with the best loss of each target, beside the baseline that it is compared with.

        ``{"0.6": {"trial": 17, "loss": ..., "reference": "uniform", "reference_loss": ...}}``.
        """
        names = references(self._baselines)
        return {label: self._beside(t, names[label]) for label, t in self._best.items()}

    def _beside(self, trial: Trial, name: str) -> dict[str, Any]:
        beside = self._baselines[name].measurement.values["loss"]
        return {
            "trial": trial.number,
            "loss": trial.measurement.values["loss"],
            "reference": name.rpartition("@")[0],
            "reference_loss": beside,
        }

    def hypervolume(self) -> float | None:
        """Of the front, see `hypervolume_series`."""
        trials = {t.number: t for t in [*self._baselines.values(), *self._front]}
        series = hypervolume_series(
            trials.values(), self.settings.objectives, set(self._names), self._fidelity
        )
        return series[-1][1] if series else None
