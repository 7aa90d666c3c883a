"""Export of a trial: a pruned model on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.search.app.forecasting import stream_by
from secateur.search.app.session import Say, is_sequential, reopen_session, silent, usage_errors
from secateur.search.controller import Trial
from secateur.search.results.paired import against_baseline
from secateur.search.results.run import Run, open_run
from secateur.spaces.measurement import MARGIN, TASK, Fidelity
from secateur.spaces.streaming import Stream

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary
    from secateur.evaluators.session import Session
    from secateur.pruners.export.manifest import Manifest
    from secateur.pruners.models.mapped import MappedModel
    from secateur.pruners.pruner import Config


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
    stream: str | None = None,
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
        stream: word of `STREAM`: weights are pruned and written block by block; None: that of the settings, where
            candidates can be made so.
        say: given progress, one line at a time.

    Raises:
        UsageError: if the run's model or data have changed, `to` is not empty, or the format can't carry the model, or
            is to be streamed and can't be.
        ExportError: if the model can't be written, or does not load as it should.
    """
    from secateur.pruners.models.mapped import MappedModel, NotStreamedError
    from secateur.pruners.models.opening import refuse

    view = open_run(directory)
    word = stream_by(None, view.settings.stream if stream is None else stream)
    making = _Export(view, trial, to, is_sequential(view.settings, calibration), form, say)
    session = making.session(word)
    if isinstance(session.loaded, MappedModel):
        with usage_errors():
            try:
                return making.streamed(session, session.loaded)
            except NotStreamedError as error:
                refuse("always" if stream == "always" else "auto", error, say)
        session = making.session("never")
    return making.whole(session)


@dataclass(frozen=True)
class _Export:
    """One export of a run.

    Args:
        view: of the run.
        trial, to, form, say: see `export`.
        sequential: see `Pruner.prune`.
    """

    view: Run
    trial: Trial
    to: Path
    sequential: bool
    form: str | None
    say: Say

    def session(self, stream: Stream) -> Session:
        """The run's session, with the model opened by a word of `STREAM`."""
        session = reopen_session(self.view, self.say, stream=stream)
        session.pruner.reuse(self.view.study.directory / LEVELS)
        with usage_errors():
            session.open_damaged(self.view.study.directory)
        return session

    def streamed(self, session: Session, loaded: MappedModel) -> ExportSummary:
        """Made block by block from the mapped files of the session's model.

        Raises:
            NotStreamedError: if the candidate can't be made so.
        """
        from secateur.evaluators.streaming import export_streamed

        return export_streamed(
            loaded,
            session.anatomy,
            session.pruner.blockwise(self._config(session), sequential=self.sequential),
            self.to,
            self._manifest(session),
            data=session.data(),
            fidelities=session.plan.final_fidelities,
            searched=self._searched(session),
            say=self.say,
        )

    def whole(self, session: Session) -> ExportSummary:
        """Made of the whole model in memory."""
        from secateur.evaluators import exporting

        return exporting.export(
            session.pruner,
            session.loaded,
            self._config(session),
            self.to,
            self._manifest(session),
            sequential=self.sequential,
            data=session.data(),
            fidelities=session.plan.final_fidelities,
            searched=self._searched(session),
            say=self.say,
        )

    def _config(self, session: Session) -> Config:
        return session.config(self.trial.measurement.candidate)

    def _manifest(self, session: Session) -> Manifest:
        from secateur.evaluators.exporting import new_manifest

        plan = session.plan
        return new_manifest(
            session.pruner,
            session.loaded,
            self.trial.measurement.candidate,
            self._config(session),
            sequential=self.sequential,
            seeds={"evaluator": plan.seed, "search": self.view.settings.seed},
            texts={"search": plan.search, "test": plan.test},
            form=self.form,
        )

    def _searched(self, session: Session) -> dict[str, dict[str, float]]:
        """Earlier measurements, for the record."""
        fidelities = session.plan.fidelities[-2:]
        found = _as_searched(self.view, self.trial.measurement.candidate, fidelities)
        return _against(self.view, self.trial) | found


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
