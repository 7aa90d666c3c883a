"""Progress of a search: one fold over its measurements, read by every display of a search."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from secateur.search.budget import Spent
from secateur.search.controller import Trial
from secateur.search.results.front import hypervolume_series, non_dominated
from secateur.search.results.targets import best_by_target, references, target_sparsities
from secateur.search.settings.settings import Settings
from secateur.search.study.study import trials_of
from secateur.spaces.measurement import SEARCHED

PACE = ("evaluations_per_hour", "tokens_per_second", "seconds_left")


class Progress:
    """Counts, front, hypervolume, best losses and pace; an update costs as much as its new trials.

    Args:
        baselines: canonical texts of the baselines by name.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        settings: Settings,
        baselines: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.spent = Spent()  # on the search
        self._names = {text: name for name, text in baselines.items()}
        self._fidelity = settings.evaluator.compared
        self._measured: Counter[str] = Counter()  # by fidelity
        self._infeasible: Counter[str] = Counter()  # by reason
        self._baselines: dict[str, Trial] = {}  # feasible, by name
        self._comparable: list[Trial] = []  # feasible, at the fidelity of the front
        self.front: list[Trial] = []
        self._targets: dict[str, float] = {}  # as far as their baselines are known
        self._best: dict[str, Trial] = {}  # by target
        self._volume: tuple[frozenset[int], float | None] = frozenset(), None  # of these trials
        self._clock = clock
        self.start(0)

    def start(self, n_known: int) -> None:
        """Start the clock of the pace; trials from the number `n_known` on count for it."""
        self.n_known, self._began, self._fresh = n_known, self._clock(), Spent()

    def add(self, trials: Iterable[Trial]) -> None:
        """Add new trials, in the order of their numbers."""
        trials = list(trials)
        searched = trials_of(trials, *SEARCHED)
        self.spent = self.spent.plus(searched)
        self._fresh = self._fresh.plus(t for t in searched if t.number >= self.n_known)
        self._measured.update(t.measurement.fidelity.text for t in trials)
        self._infeasible.update(t.measurement.infeasible for t in trials if t.measurement.infeasible)
        new = [t for t in trials if t.measurement.fidelity == self._fidelity and not t.measurement.infeasible]
        found = {self._names.get(t.measurement.candidate): t for t in new}
        baselines = self._baselines | {name: t for name, t in found.items() if name is not None}
        self._baselines = {name: baselines[name] for name in self._names.values() if name in baselines}
        self._comparable += new
        self.front = non_dominated([*self.front, *new], self.settings.objectives, self._fidelity)
        known = target_sparsities(self._baselines)
        if known == self._targets:
            self._best = best_by_target([*self._best.values(), *new], known)
        else:  # a trial before its baseline had no target yet
            self._targets, self._best = known, best_by_target(self._comparable, known)

    def facts(self) -> dict[str, Any]:
        """Plain values of the whole search.

        ``best`` holds the trial with the lowest loss of each target, beside the baseline that it is compared with:
        ``{"0.6": {"trial": 17, "loss": ..., "reference": "uniform", "reference_loss": ...}}``.
        """
        names = references(self._baselines)
        return {
            "measurements": dict(self._measured),
            "infeasible": dict(self._infeasible),
            "spent": asdict(self.spent),
            "budget": self.settings.budget.model_dump(exclude_none=True),
            "used": min(1.0, self.settings.budget.share(self.spent)),
            "front": len(self.front),
            "hypervolume": self._hypervolume(),
            "best": {label: self._beside(trial, names[label]) for label, trial in self._best.items()},
        }

    def pace(self) -> dict[str, float | None]:
        """Speed by wall time since `start`, and the time until the budget is used up; None before anything is known."""
        elapsed, fresh, budget = self._clock() - self._began, self._fresh, self.settings.budget
        if not (fresh.evaluations and elapsed > 0):
            return dict.fromkeys(PACE)
        left = elapsed * (1 - min(1.0, budget.share(self.spent))) / budget.share(fresh)
        return dict(
            zip(PACE, (3600 * fresh.evaluations / elapsed, fresh.tokens / elapsed, left), strict=True)
        )

    def _beside(self, trial: Trial, name: str) -> dict[str, Any]:
        return {
            "trial": trial.number,
            "loss": trial.measurement.values["loss"],
            "reference": name.rpartition("@")[0],
            "reference_loss": self._baselines[name].measurement.values["loss"],
        }

    def _hypervolume(self) -> float | None:
        """Hypervolume of the front, see `hypervolume_series`."""
        trials = {t.number: t for t in [*self._baselines.values(), *self.front]}
        numbers, known = self._volume
        if numbers != trials.keys():  # else nothing has changed
            series = hypervolume_series(
                trials.values(), self.settings.objectives, set(self._names), self._fidelity
            )
            known = series[-1][1] if series else None
            self._volume = frozenset(trials), known
        return known
