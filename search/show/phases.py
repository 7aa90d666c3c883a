"""Phases of a search: baselines, the start of its controller, its search, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.results.run import Run
from secateur.spaces.measurement import SEARCHED


@dataclass(frozen=True)
class Phase:
    """Part of a search.

    Args:
        letter: in pictures.
        name: for people.
        first, end: numbers of its first trial and of the one behind its last.
        first_tokens, end_tokens: tokens of the search that were evaluated before it, and at its end.
    """

    letter: str
    name: str
    first: int
    end: int
    first_tokens: int
    end_tokens: int


def phases(run: Run) -> list[Phase]:
    """Phases of a run with trials, those without a trial left out.

    The measurements of the search before a controller's first result of its own are its start; they are counted by the
    controller itself, made anew from the run's settings.
    """
    trials, baselines = run.study.trials, set(run.study.about.baselines.values())
    searched = [trial for trial in trials if trial.measurement.fidelity.part in SEARCHED]
    n_tokens = [0, *accumulate(trial.measurement.n_tokens for trial in searched)]
    n_baselines = next(
        (i for i, t in enumerate(searched) if t.measurement.candidate not in baselines), len(searched)
    )
    kind = run.settings.controller.kind
    first = min(n_baselines + _n_first(run), len(searched))
    named = [
        ("baselines", 0, n_baselines),
        (f"start by {_start(run.settings.controller)}", n_baselines, first),
        (f"search by {kind}", first, len(searched)),
    ]
    numbers = [trial.number for trial in searched]
    return [
        Phase("ABC"[i], name, numbers[a], numbers[b - 1] + 1, n_tokens[a], n_tokens[b])
        for i, (name, a, b) in enumerate(row for row in named if row[1] < row[2])
    ]


def _n_first(run: Run) -> int:
    """Measurements before the controller's first result; 0 where only the open model could tell."""
    of = run.settings
    row = CONTROLLERS[of.controller.kind]
    if row.screens(of.controller) or row.multi_objective or not _start(of.controller):
        return 0
    try:
        controller = row.build(run.space, of.evaluator.search_fidelities, of.seed, of.controller)
    except ValueError:
        return 0
    return controller.n_measurements


def _start(controller: Any) -> str:
    """Name of what a controller measures before its search, such as the probes of `sensitivity`; "" if nothing."""
    of = controller.model_dump()  # each kind has fields of its own
    first = of.get("start") or of.get("prior") or of["kind"]
    return {"sensitivity": "sensitivity", "greedy": "greedy", "trust_region": "curvature"}.get(first, "")


def phase_lines(found: Sequence[Phase]) -> list[str]:
    """Line of each phase for people."""
    return [
        f"{p.letter}: {p.name}, trials {p.first:,} to {p.end - 1:,}, {p.end_tokens - p.first_tokens:,} tokens"
        for p in found
    ]
