"""Pareto front of a study's trials, and its hypervolume over the search."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.objectives import objective, oriented
from secateur.search.results.hypervolume import exclusive_volume
from secateur.spaces.measurement import Fidelity

_AT_ONCE = 256
"""Trials that are compared with a front in one call."""


def comparable(trials: Iterable[Trial], fidelity: Fidelity | None = None) -> list[Trial]:
    """Feasible trials at one fidelity, by default the largest search fidelity among them, in order of numbers."""
    trials = sorted(trials, key=lambda trial: trial.number)
    if fidelity is None:
        found = (t.measurement.fidelity for t in trials)
        fidelity = max((f for f in found if f.part == "search"), default=None)
    return [t for t in trials if t.measurement.fidelity == fidelity and t.measurement.infeasible is None]


def non_dominated(
    trials: Iterable[Trial], objectives: Sequence[str], fidelity: Fidelity | None = None
) -> list[Trial]:
    """Non-dominated trials: no other one equals or beats them in every objective, in the digits that count there.

    Args:
        objectives: names in `OBJECTIVES`, each with its direction; at least one.
        fidelity: what to compare at; None for the largest search fidelity among the trials.

    Returns:
        Ordered by the objectives, the best of the first objective first. Of trials that are equal in all
        objectives the one with the lowest number.
    """
    _check(objectives)
    among = comparable(trials, fidelity)
    points, numbers = _rounded(among, objectives), np.array([trial.number for trial in among])
    rest = np.lexsort((numbers, *points.T[::-1]))
    kept: list[Trial] = []
    while len(rest):  # sorted: nothing that follows dominates the first
        kept.append(among[rest[0]])
        rest = rest[np.any(points[rest] < points[rest[0]], axis=1)]
    return kept


def _rounded(trials: Sequence[Trial], objectives: Sequence[str]) -> NDArray[np.float64]:
    """``trials objectives``, lower is better, in the digits that count on a front."""
    values = np.array([oriented(t, objectives) for t in trials]).reshape(len(trials), len(objectives))
    for name, column in zip(objectives, values.T, strict=True):
        different, places = np.unique(column, return_inverse=True)
        column[:] = np.array([objective(name).rounded(value) for value in different.tolist()])[places]
    return values


def hypervolume_series(
    trials: Iterable[Trial],
    objectives: Sequence[str],
    baselines: Collection[str],
    fidelity: Fidelity | None = None,
) -> list[tuple[int, float]]:
    """Hypervolume of the front after each trial.

    Each objective is scaled so that the best baseline lies at 0 and the worst at 1, which is the reference
    point: 1 means a trial as good as the best baseline in everything. An objective in which the
    baselines don't differ is left out.

    Args:
        baselines: canonical texts of the baselines.
        fidelity: as for `non_dominated`.

    Returns:
        (trial number, hypervolume up to this trial), one a comparable trial; empty if no two feasible
        baselines differ.
    """
    _check(objectives)
    shown = comparable(trials, fidelity)
    values = np.array([oriented(t, objectives) for t in shown]).reshape(len(shown), len(objectives))
    known = values[[t.measurement.candidate in baselines for t in shown]]
    if not len(known):
        return []
    best, span = known.min(axis=0), np.ptp(known, axis=0)
    if not span.any():
        return []
    points = (values - best)[:, span > 0] / span[span > 0]
    reference, front = np.ones(points.shape[1]), points[:0]
    volume, series = 0.0, []
    for start in range(0, len(shown), _AT_ONCE):
        some = points[start : start + _AT_ONCE]
        dominated = np.any(np.all(front[:, None] <= some, axis=2), axis=0)  # now, and by what follows
        for trial, point, is_dominated in zip(shown[start:], some, dominated, strict=False):
            gain = 0.0 if is_dominated else exclusive_volume(point, front, reference)
            if gain > 0:
                volume += gain
                front = np.vstack([front[~np.all(front >= point, axis=1)], point])
            series.append((trial.number, volume))
    return series


def _check(objectives: Sequence[str]) -> None:
    if not objectives:
        raise UsageError("Expected `objectives` to name some, got none.")
    try:
        for name in objectives:
            objective(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
