"""Search in stages: finer levels around what the stage before found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.search.app.found import best_of
from secateur.search.app.searching import Foretell, no_forecast, search_stage
from secateur.search.app.session import Say, silent
from secateur.search.loop.loop import Outcome
from secateur.search.results.run import open_run
from secateur.search.settings.settings import Settings
from secateur.search.show.lines import Lines
from secateur.search.study.about import ABOUT

NEXT = "refined"
"""Directory of the next stage, in the run of the one before."""


def search(
    settings: Settings,
    directory: Path,
    *,
    levels: Path | None = None,
    say: Say = silent,
    forecast: Foretell = no_forecast,
    **further: Any,
) -> Outcome:
    """Search until the budget is used up, see `search_stage`, then as many further stages as `space.refine` says.

    Coarse to fine, as in Týr-the-Pruner (Li et al. 2025, arXiv 2503.09657): each stage is a run of its own in the
    directory ``refined`` of the one before, with the same controller and the same budget once more. Its levels lie at
    half the distance around the best allocation found, and their statistics come from a model that is pruned so. A
    stage keeps what it began around when an earlier one is continued.

    Args:
        settings: of the search.
        directory: of the run.
        levels: directory of the level store of the first stage, see `search_stage`.
        say: given progress, one line at a time.
        forecast: makes that of the first stage, see `search_stage`.
        further: see `search_stage`.

    Returns:
        How the last stage that ran ended.

    Raises:
        UsageError: as `search_stage` does, or if a stage found nothing.
    """
    outcome = search_stage(settings, directory, levels=levels, say=say, forecast=forecast, **further)
    if outcome.reason == "stopped" or not settings.space.stages_left:
        return outcome
    following = directory / NEXT
    if (following / ABOUT).is_file():
        found = open_run(following).settings.space.found
    else:
        run = open_run(directory)
        found = run.allocation(best_of(run))
    say(f"searching finer levels in {following}")
    space = settings.space.refined(found)
    return search(settings.model_copy(update={"space": space}), following, say=say, **further)


def search_in_lines(settings: Settings, directory: Path, *, levels: Path | None = None) -> Outcome:
    """`search` for scripts, with a printed line for each stage and each round under the directory's name."""
    lines = Lines(directory.name, settings)
    return search(
        settings, directory, observers=[lines], say=lines.say, on_ready=lines.on_ready, levels=levels
    )


def last_stage(directory: Path) -> Path:
    """Directory of the last stage that has begun; the run itself if there is one alone."""
    following = directory / NEXT
    return last_stage(following) if (following / ABOUT).is_file() else directory
