"""From a trial to a model on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.search.app.bench import Say, check_content, open_bench, silent
from secateur.search.controller import Trial
from secateur.search.run import Run, open_run
from secateur.spaces.measurement import Fidelity

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary


def export(
    directory: Path,
    trial: Trial,
    to: Path,
    *,
    calibration: str | None = None,
    say: Say = silent,
) -> ExportSummary:
    """Prune the model once more, for real, measure it, and save it as a directory that transformers loads.

    Args:
        directory: of the run.
        trial: of its study.
        to: new or empty directory, or one that holds this export already.
        calibration: ``sequential`` (statistics of a block from already pruned blocks), ``dense`` (the very
            weights that the search measured); None as the settings say.
        say: told in one line what is being done.

    Raises:
        UsageError: if the run's model or data have changed, or `to` is not empty.
        ExportError: if the model can't be written, or does not load as it should.
    """
    from secateur.evaluators.exporting import export_candidate

    view = open_run(directory)
    bench = open_bench(view.settings, say)
    check_content(view, bench)
    candidate = trial.measurement.candidate
    return export_candidate(
        bench,
        candidate,
        to,
        sequential=(calibration or bench.plan.space.calibration) == "sequential",
        seeds={"evaluator": bench.plan.seed, "search": view.settings.seed},
        searched=_as_searched(view, candidate, bench.plan.fidelities[-2:]),
        say=say,
    )


def _as_searched(view: Run, candidate: str, fidelities: Sequence[Fidelity]) -> dict[str, dict[str, float]]:
    """What the study knows about the candidate."""
    found = {fidelity: view.study.lookup((candidate, fidelity.text)) for fidelity in fidelities}
    return {
        f"{fidelity.text}, as searched": {name: trial.measurement.values[name] for name in ("kl", "ce")}
        for fidelity, trial in found.items()
        if trial is not None and trial.measurement.infeasible is None
    }
