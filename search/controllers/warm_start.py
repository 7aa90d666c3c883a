"""What another run found, as candidates to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from secateur.search.results.front import comparable, non_dominated
from secateur.search.study.study import SETTINGS, Study
from secateur.spaces.space import SeparableSpace, Space


def front_of(directory: Path, space: Space[Any]) -> list[tuple[int, Any]]:
    """The front of a run, less its baselines, as candidates of this space with the targets that they meet.

    A candidate that meets none is repaired to the target nearest to what it uses up. The front may grow while
    its search goes on: a search that shall be continued by replay starts from one that has ended.

    Args:
        directory: of the run.
        space: what is searched now; candidates of the run that are none of its own are left out.

    Returns:
        (index of the target, candidate), in the order of the front, each candidate once.

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
    """The target whose usage is nearest to the candidate's; the lower one if two are. The only one of a space."""
    if not isinstance(space, SeparableSpace):
        return 0
    usage = sum(space.usage(slot, option) for slot, option in enumerate(space.disassemble(candidate)))
    return min(range(len(space.targets)), key=lambda b: abs(space.usage_bounds(b)[0] - usage))
