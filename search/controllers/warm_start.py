"""Warm start: candidates from the front of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from secateur.search.results.front import comparable, non_dominated
from secateur.search.study.study import SETTINGS, Study
from secateur.spaces.space import SeparableSpace, Space


def front_of(directory: Path, space: Space[Any]) -> list[tuple[int, Any]]:
    """Front of a run without its baselines, as candidates of a space with the targets they meet.

    A candidate that meets no target is repaired to the nearest one. The front of an unfinished run may still grow:
    start from a finished one, so that the search can be continued by replay. Other spaces' candidates are skipped.

    Returns:
        (index of the target, candidate), in the order of the front, without duplicates.

    Raises:
        ValueError: if there is no run in the directory, or no candidate of this space on its front.
    """
    with Study.open(directory) as study:
        objectives = study.settings.get("objectives") or ["loss"]
        baselines = set(study.about.baselines.values())
        trials = [t for t in comparable(study.trials) if t.measurement.candidate not in baselines]
    found: dict[str, tuple[int, Any]] = {}
    for trial in non_dominated(trials, objectives):
        try:
            candidate = space.parse(trial.measurement.candidate)
        except ValueError:
            continue
        target = space.target_of(candidate)
        if target is None:
            target = _nearest_target(space, candidate)
            candidate = space.repair(candidate, target, np.random.default_rng(trial.number))
        found.setdefault(candidate.text, (target, candidate))
    if not found:
        raise ValueError(
            f"Expected `warm_start` to be a run with candidates of this space on its front, got {directory}. "
            f"Compare `space` in its {SETTINGS} with the one here."
        )
    return list(found.values())


def _nearest_target(space: Space[Any], candidate: Any) -> int:
    """Index of the target nearest to the candidate's usage, the lower of two; 0 unless the space is separable."""
    if not isinstance(space, SeparableSpace):
        return 0
    usage = sum(space.usage(slot, option) for slot, option in enumerate(space.disassemble(candidate)))
    return min(range(len(space.targets)), key=lambda b: abs(space.usage_bounds(b)[0] - usage))
