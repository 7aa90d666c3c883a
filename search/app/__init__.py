"""The one place that puts the rooms together: search, read a run, export, upload, recover, evaluate, time.

Everything that needs torch is imported inside the functions, so that reading a run stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.benching import bench
from secateur.search.app.describing import describe_model
from secateur.search.app.dry_run import dry_run
from secateur.search.app.evaluating import evaluate, tasks_in
from secateur.search.app.exporting import export
from secateur.search.app.forecasting import forecast_before
from secateur.search.app.pruning import prune
from secateur.search.app.pushing import push
from secateur.search.app.recovering import recover
from secateur.search.app.session import Say, open_session, plan, silent
from secateur.search.app.stages import last_stage, search, search_in_lines
from secateur.search.app.timing import compare_latency, measure_latency
from secateur.search.controller import Trial
from secateur.search.results.run import Run
from secateur.search.settings.settings import load_settings, settings_from
from secateur.search.study.study import Study

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary

__all__ = [
    "SearchedRun",
    "bench",
    "compare_latency",
    "describe_model",
    "dry_run",
    "evaluate",
    "export",
    "forecast_before",
    "last_stage",
    "load_settings",
    "measure_latency",
    "open_run",
    "open_session",
    "plan",
    "prune",
    "push",
    "recover",
    "run",
    "search",
    "search_in_lines",
    "tasks_in",
]


class SearchedRun(Run):
    """A run that can also make its models."""

    def export(
        self, trial: Trial, to: str | Path, *, calibration: str | None = None, form: str | None = None
    ) -> ExportSummary:
        """See `export`."""
        return export(self.study.directory, trial, Path(to), calibration=calibration, form=form)


def open_run(directory: str | Path) -> SearchedRun:
    """A run to read from and to export from.

    Raises:
        UsageError: if the directory holds no study, or a damaged one.
    """
    found = SearchedRun(Study.open(directory))
    found.check()
    return found


def run(directory: str | Path, *, say: Say = silent, **settings: Any) -> SearchedRun:
    """Search, or continue where a search stopped, and give the run: the way in from Python.

    Args:
        directory: of the run; made if it is missing.
        say: given progress, one line at a time.
        settings: as in a settings file, e.g. ``model="tiny", space={"target": 0.5}``.

    Raises:
        UsageError: if the settings are wrong, or the directory belongs to another search.
    """
    search(settings_from(settings), Path(directory), say=say)
    return open_run(last_stage(Path(directory)))
