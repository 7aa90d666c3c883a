"""Comparison of runs on the test text: mean and spread over seeds, paired differences, and their merged front."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.results.front import non_dominated
from secateur.search.results.paired import Estimate, against_baseline, difference
from secateur.search.results.run import Run
from secateur.search.results.targets import best_by_target, references, target_sparsities
from secateur.search.settings.settings import resolved
from secateur.spaces.measurement import Measurement, perplexity_of

NO_PART = ("seed", "executor", "storage", "device")
"""Settings that runs of one kind may differ in, beside the seeds of the evaluator."""


@dataclass(frozen=True)
class Spread:
    """Mean over runs, with their standard deviation; None of one run alone."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Spread of some values; None of none."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Found:
    """Best pruned model of a run at a target, by its loss in the search.

    Args:
        run: that it is of.
        trial: of the search.
        reference: the target's baseline.
        test: measurement on the test part.
        ratio: of the test loss to the baseline's.
    """

    run: Run
    trial: Trial
    reference: Trial
    test: Measurement
    ratio: Estimate | None

    @property
    def search_ratio(self) -> float | None:
        """Ratio of the losses in the search."""
        below = self.reference.measurement.values["loss"]
        return self.trial.measurement.values["loss"] / below if below > 0 else None


@dataclass(frozen=True)
class ComparedRow:
    """Runs that differ in their seeds alone, at one target.

    Args:
        name: of the runs, by the settings in which they differ from the others.
        target: label of the target.
        found: best model of each run.
        over_windows: mean difference of the test loss to the first row's of this target, paired over test windows;
            None for that row itself, or where the runs were not tested alike.
        over_seeds: likewise, paired over seeds that both have; None unless there are two.
    """

    name: str
    target: str
    found: tuple[Found, ...]
    over_windows: Estimate | None = None
    over_seeds: Spread | None = None

    @property
    def test_ratio(self) -> Spread | None:
        return Spread.of([x.ratio.value for x in self.found if x.ratio is not None])

    @property
    def test_loss(self) -> Spread | None:
        return Spread.of([x.test.values["loss"] for x in self.found])

    @property
    def search_ratio(self) -> Spread | None:
        return Spread.of([x.search_ratio for x in self.found if x.search_ratio is not None])

    @property
    def perplexity(self) -> Spread | None:
        return Spread.of([perplexity_of(x.test.values["ce"]) for x in self.found if "ce" in x.test.values])


def compared(runs: Sequence[Run]) -> list[ComparedRow]:
    """Rows by target, in the order of the runs.

    Raises:
        UsageError: if no run has a pruned model that was measured on the test text.
    """
    first: dict[str, ComparedRow] = {}
    rows = []
    for name, group in _named(runs).items():
        found = [_found(run) for run in group]
        for target in dict.fromkeys(label for each in found for label in each):
            row = ComparedRow(name, target, tuple(each[target] for each in found if target in each))
            rows.append(_against(row, first[target]) if target in first else row)
            first.setdefault(target, row)
    if not rows:
        raise UsageError(
            "Expected runs with pruned models that were measured on the test text, got none. Let a search end: it "
            "measures its front there."
        )
    return sorted(rows, key=lambda row: list(first).index(row.target))


def merged_front(runs: Sequence[Run]) -> list[tuple[Run, Trial]]:
    """Front of all models of all runs that were measured on the test text, by their values there.

    Raises:
        UsageError: if the runs have other objectives, or were not tested alike.
    """
    objectives, tested = runs[0].objectives, _tested(runs[0])
    for run in runs[1:]:
        if run.objectives != objectives or _tested(run) != tested:
            what = "objectives" if run.objectives != objectives else "model, loss and test windows"
            raise UsageError(
                f"Expected runs with the same {what} for one front, got others in {run.study.directory}. Compare them "
                "without `--front`."
            )
    fidelity = runs[0].settings.evaluator.test_fidelity
    places: list[tuple[Run, Trial]] = []
    points: list[Trial] = []
    for run in runs:
        for trial in run.study.trials:
            if trial.measurement.fidelity == fidelity:
                places.append((run, trial))
                points.append(Trial(len(points), trial.measurement))
    return [places[point.number] for point in non_dominated(points, objectives, fidelity)]


def _found(run: Run) -> dict[str, Found]:
    """Best model of each target, by its label."""
    baselines = {name: t for name, t in run.baselines.items() if t.measurement.infeasible is None}
    names, found = references(baselines), {}
    for label, trial in best_by_target(run.trials(), target_sparsities(baselines)).items():
        test = run.test_of(trial)
        if test is not None and test.infeasible is None:
            reference = baselines[names[label]]
            found[label] = Found(run, trial, reference, test, against_baseline(run, trial))
    return found


def _against(row: ComparedRow, first: ComparedRow) -> ComparedRow:
    """The row with its differences to the first one of its target."""
    if {json.dumps(_tested(x.run), sort_keys=True) for x in (*row.found, *first.found)} != {
        json.dumps(_tested(row.found[0].run), sort_keys=True)
    }:
        return row
    over_windows = difference([x.test for x in row.found], [x.test for x in first.found], first.name)
    ours, theirs = ({x.run.settings.seed: x.test.values["loss"] for x in y.found} for y in (row, first))
    gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    over_seeds = Spread.of(gaps) if len(gaps) > 1 else None
    return ComparedRow(row.name, row.target, row.found, over_windows, over_seeds)


def _tested(run: Run) -> dict[str, Any]:
    """All that decides what a test loss means: model, loss, and windows."""
    of, content = run.settings.evaluator, run.described("identity.content", dict[str, Any], {})
    kept = {name: content.get(name) for name in ("model", "test_text", "bos")}
    return {**kept, "loss": of.loss, "window": of.window, "fidelity": of.test_fidelity.text}


def _named(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seeds alone, by a name."""
    groups: dict[str, list[Run]] = {}
    flat: dict[str, dict[str, str]] = {}
    for run in runs:
        values = _flat(resolved(run.settings))
        plain = {
            key: x for key, x in values.items() if key.split(".")[0] not in NO_PART and key[-5:] != ".seed"
        }
        key = json.dumps(plain, sort_keys=True)
        groups.setdefault(key, []).append(run)
        flat[key] = plain
    names = [dict.fromkeys(key for x in flat.values() for key in x)][0]
    differing = [key for key in names if len({x.get(key) for x in flat.values()}) > 1]
    named: dict[str, list[Run]] = {}
    for key, group in groups.items():
        name = _name(group[0], flat[key], differing)
        named[name if name not in named else str(group[0].study.directory)] = group
    return named


def _name(run: Run, values: Mapping[str, str], differing: Sequence[str]) -> str:
    """Name of a group: what its runs are, or how they differ from the others, if that is short."""
    kinds = [values[key] for key in ("controller.kind", "space.kind") if key in differing]
    if kinds or not differing:
        return " of ".join(kinds or [values["controller.kind"], values["space.kind"]])
    if len(differing) <= 2:
        return ", ".join(f"{key} {values.get(key, 'absent')}" for key in differing)
    return run.study.directory.name


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as texts by their paths."""
    found: dict[str, str] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return found
