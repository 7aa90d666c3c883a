"""Export of a trial: a pruned model on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.search.app.session import Say, is_sequential, reopen_session, silent, usage_errors
from secateur.search.controller import Trial
from secateur.search.results.paired import against_baseline
from secateur.search.results.run import Run, open_run
from secateur.spaces.measurement import MARGIN, TASK, Fidelity

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary


LEVELS = "levels"
"""Directory in a run that `Pruner.prepare` writes."""

RECORDED = ("kl", "ce", "weighted_kl", "acceptance", "latency_", TASK, MARGIN)
"""Prefixes of the searched values that an export's record has."""


def export(
    directory: Path,
    trial: Trial,
    to: Path,
    *,
    calibration: str | None = None,
    form: str | None = None,
    say: Say = silent,
) -> ExportSummary:
    """Prune the model for good, measure it, and save it as a directory that transformers loads.

    Args:
        directory: of the run.
        trial: of its study.
        to: new or empty directory, or one that holds this export already.
        calibration: ``sequential`` (statistics of a block from already pruned blocks), or ``dense`` or ``expected``,
            whichever the search had (the very weights that it measured); None: that of the settings.
        form: a name that ``secateur list formats`` shows; None: that of the settings, or else the usual one.
        say: given progress, one line at a time.

    Raises:
        UsageError: if the run's model or data have changed, `to` is not empty, or the format can't carry the model.
        ExportError: if the model can't be written, or does not load as it should.
    """
    from secateur.evaluators import exporting

    view = open_run(directory)
    sequential = is_sequential(view.settings, calibration)
    session = reopen_session(view, say)
    session.pruner.reuse(directory / LEVELS)
    with usage_errors():
        session.open_damaged(directory)
    candidate, plan = trial.measurement.candidate, session.plan
    config = session.config(candidate)
    seeds = {"evaluator": plan.seed, "search": view.settings.seed}
    manifest = exporting.new_manifest(
        session.pruner,
        session.loaded,
        candidate,
        config,
        sequential=sequential,
        seeds=seeds,
        texts={"search": plan.search, "test": plan.test},
        form=form,
    )
    return exporting.export(
        session.pruner,
        session.loaded,
        config,
        to,
        manifest,
        sequential=sequential,
        data=session.data(),
        fidelities=plan.final_fidelities,
        searched=_against(view, trial) | _as_searched(view, candidate, plan.fidelities[-2:]),
        say=say,
    )


def _against(view: Run, trial: Trial) -> dict[str, dict[str, float]]:
    """Ratio of the test losses of the trial and of its target's baseline in the study, with its interval of 95 %."""
    [searched] = view.as_searched([trial])
    found = against_baseline(view, searched)
    if found is None:
        return {}
    ends = {} if found.half is None else {"low": found.value - found.half, "high": found.value + found.half}
    fidelity = view.settings.evaluator.test_fidelity.text
    return {f"{fidelity}, as searched, against {found.of}": {"loss ratio": found.value, **ends}}


def _as_searched(view: Run, candidate: str, fidelities: Sequence[Fidelity]) -> dict[str, dict[str, float]]:
    """Values of the candidate in the study, by fidelity."""
    found = {fidelity: view.study.lookup((candidate, fidelity.text)) for fidelity in fidelities}
    return {
        f"{fidelity.text}, as searched": {
            name: value for name, value in trial.measurement.values.items() if name.startswith(RECORDED)
        }
        for fidelity, trial in found.items()
        if trial is not None and trial.measurement.infeasible is None
    }
