"""The study as Optuna's tools see it: a copy in a journal file, made from the truth and never read back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.controller import Trial
from secateur.search.loop import Outcome
from secateur.search.objectives import OBJECTIVES
from secateur.search.settings import Budget
from secateur.search.study import Spent, Study
from secateur.spaces.measurement import Fidelity
from secateur.spaces.space import Space

if TYPE_CHECKING:  # takes a second to import
    import optuna

NAME = "optuna.log"
STUDY_NAME = "secateur"


class Mirror:
    """Writes the search trials of one fidelity to ``optuna.log``, feasible ones as complete, others as failed.

    A parameter a slot of the space, with the index of its option as value; candidate, trial number, fidelity
    and reason are user attributes. A file that is damaged or that belongs to other objectives is made anew.
    As an observer of a search it follows along; if it can't write, it gives up and says so in `failure`.

    Args:
        study: open for writing, so that nobody else writes the mirror.
        space: of its candidates.
        objectives: names in `OBJECTIVES`.
        fidelity: of the trials to show.
    """

    def __init__(
        self, study: Study, space: Space[Any], objectives: Sequence[str], fidelity: Fidelity
    ) -> None:
        self.failure: str | None = None
        self._study = study
        self._space = space
        self._objectives = tuple(objectives)
        self._fidelity = fidelity
        self._about = {"objectives": list(objectives), "fidelity": fidelity.text, "slots": list(space.slots)}
        self._path = (study.directory / NAME).absolute()
        self._copy: optuna.Study | None = None
        self._n_seen = 0  # trials of the study that are in the copy or don't belong there

    def catch_up(self) -> None:
        """Add what is in the study and not yet in the mirror.

        Raises:
            OSError: if the file can't be written.
        """
        if self._copy is None:
            self._copy = self._open()
        for trial in self._study.trials[self._n_seen :]:
            if trial.measurement.fidelity == self._fidelity:
                self._copy.add_trial(self._frozen(trial))
            self._n_seen += 1

    def _open(self) -> optuna.Study:
        """The copy, made anew if what is in the file is no beginning of this study."""
        self._path.with_name(NAME + ".lock").unlink(missing_ok=True)  # left by a driver that was killed
        if self._path.exists():
            _cut_torn_line(self._path)
            try:
                return self._continued()
            except (ValueError, LookupError, TypeError, AttributeError, AssertionError):
                self._path.unlink()  # damaged, or of other objectives
        self._n_seen = 0
        sampler = _optuna().samplers.RandomSampler()  # not used
        directions = [OBJECTIVES[name].direction for name in self._objectives]
        copy: optuna.Study = _optuna().create_study(
            storage=self._storage(), study_name=STUDY_NAME, directions=directions, sampler=sampler
        )
        copy.set_user_attr("about", self._about)
        return copy

    def _continued(self) -> optuna.Study:
        """The copy in the file.

        Raises:
            ValueError, and what Optuna raises on a damaged file: if it can't be continued.
        """
        sampler = _optuna().samplers.RandomSampler()
        copy: optuna.Study = _optuna().load_study(
            storage=self._storage(), study_name=STUDY_NAME, sampler=sampler
        )
        numbers = [frozen.user_attrs["number"] for frozen in copy.get_trials(deepcopy=False)]
        ours = [t.number for t in self._study.trials if t.measurement.fidelity == self._fidelity]
        if copy.user_attrs["about"] != self._about or numbers != ours[: len(numbers)]:
            raise ValueError("Expected a mirror of this study, got another.")
        self._n_seen = numbers[-1] + 1 if numbers else 0
        return copy

    def _storage(self) -> optuna.storages.JournalStorage:
        from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalStorage

        path = str(self._path)
        return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileSymlinkLock(path, grace_period=3)))

    def _frozen(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """The trial in Optuna's terms."""
        m = trial.measurement
        options = self._space.disassemble(self._space.parse(m.candidate))
        distributions: dict[str, Any] = {
            name: _optuna().distributions.IntDistribution(min(known), max(known))
            for name, known in ((name, self._space.options(i)) for i, name in enumerate(self._space.slots))
        }
        attributes = {"number": trial.number, "candidate": m.candidate, "fidelity": m.fidelity.text}
        feasible = m.infeasible is None
        states = _optuna().trial.TrialState
        frozen: optuna.trial.FrozenTrial = _optuna().trial.create_trial(
            state=states.COMPLETE if feasible else states.FAIL,
            values=[m.values[name] for name in self._objectives] if feasible else None,
            params=dict(zip(self._space.slots, options, strict=True)),
            distributions=distributions,
            user_attrs=attributes if feasible else {**attributes, "infeasible": m.infeasible},
        )
        return frozen

    # --- as an observer of a search ---

    def on_start(self, n_known: int, budget: Budget) -> None:
        self._try_to_catch_up()

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        self._try_to_catch_up()

    def on_end(self, outcome: Outcome) -> None:
        """Nothing is left to do."""

    def _try_to_catch_up(self) -> None:
        if self.failure is None:
            try:
                self.catch_up()
            except OSError as error:
                self.failure = f"{self._path} is not kept up to date any more: {error}."


def _optuna() -> Any:
    """Optuna, quiet; it takes a second to import."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _cut_torn_line(path: Path) -> None:
    """Cut the file at its last newline: Optuna would append to half a line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
