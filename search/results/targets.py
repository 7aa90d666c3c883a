"""Trials by target: reference baselines, best trials, and series of the lowest loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.search.controller import Trial
from secateur.search.results.pick import SPARSITY_TOLERANCE
from secateur.spaces.measurement import SEARCHED, Fidelity


def references(baselines: Mapping[str, Trial]) -> dict[str, str]:
    """Name of the baseline that each target's trials are compared with, the first of several.

    By the target's label, e.g. ``{"0.6": "uniform@0.6"}``.
    """
    found: dict[str, str] = {}
    for name, trial in baselines.items():
        _, at, label = name.rpartition("@")
        if at and "sparsity" in trial.measurement.values:
            found.setdefault(label, name)
    return found


def best_references(baselines: Mapping[str, Trial]) -> dict[str, str]:
    """Name of the baseline of each target with the lowest loss, of equal ones the first, by the target's label.

    Args:
        baselines: feasible ones, by name.
    """
    labels = references(baselines)
    of = {label: [name for name in baselines if name.rpartition("@")[1:] == ("@", label)] for label in labels}
    return {label: min(names, key=lambda name: _loss(baselines[name])) for label, names in of.items()}


def target_sparsities(baselines: Mapping[str, Trial]) -> dict[str, float]:
    """Sparsity of each target's `references`, by its label, e.g. ``{"0.6": 0.6001}``."""
    return {
        label: baselines[name].measurement.values["sparsity"] for label, name in references(baselines).items()
    }


def target_of(trial: Trial, known: Mapping[str, float]) -> str | None:
    """Label of the target that a feasible trial meets, or None (as for the dense model)."""
    return next(iter(targets_of([trial], known)))


def targets_of(trials: Sequence[Trial], known: Mapping[str, float]) -> list[str | None]:
    """Labels of the targets that trials meet, see `target_of`; the nearest one, of equally near ones the first."""
    values = np.array([trial.measurement.values.get("sparsity", np.nan) for trial in trials])
    labels, distance = np.full(len(trials), None, dtype=object), np.full(len(trials), SPARSITY_TOLERANCE)
    for label, sparsity in known.items():
        found = np.abs(values - sparsity)
        nearer = (found < distance) | ((found == distance) & (labels == None))  # noqa: E711  # by element
        labels[nearer], distance[nearer] = label, found[nearer]
    return list(labels)


def best_by_target(trials: Sequence[Trial], known: Mapping[str, float]) -> dict[str, Trial]:
    """Trial with the lowest loss of each target among comparable trials; of equal ones the first."""
    best: dict[str, Trial] = {}
    for trial, label in zip(trials, targets_of(trials, known), strict=True):
        if label is not None and (label not in best or _loss(trial) < _loss(best[label])):
            best[label] = trial
    return {label: best[label] for label in known if label in best}


def loss_series(
    trials: Sequence[Trial], fidelity: Fidelity, known: Mapping[str, float]
) -> dict[str, list[tuple[int, float]]]:
    """Series of the lowest loss at a fidelity of each target, see `target_sparsities`; trials are in order.

    Returns:
        (tokens evaluated for the search so far, lowest loss so far), one an improvement, by target.
    """
    n_tokens, series = 0, dict[str, list[tuple[int, float]]]()
    for trial, label in zip(trials, targets_of(trials, known), strict=True):
        m = trial.measurement
        n_tokens += m.n_tokens if m.fidelity.part in SEARCHED else 0
        if m.fidelity != fidelity or m.infeasible is not None:
            continue
        points = series.setdefault(label, []) if label is not None else None
        if points is not None and (not points or _loss(trial) < points[-1][1]):
            points.append((n_tokens, _loss(trial)))
    return {label: series[label] for label in known if label in series}


def _loss(trial: Trial) -> float:
    return trial.measurement.values["loss"]
