"""Copy of a study as an Optuna study, written from the measurements and never read back into the search."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from secateur.search.controller import Trial
from secateur.search.controllers.optuna.samplers import distribution_of, quiet_optuna
from secateur.search.mirror.storages import Held, Storage
from secateur.search.objectives import objective
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity
from secateur.spaces.space import Space

if TYPE_CHECKING:
    import optuna

BATCH = 100  # trials of the study that are looked at, and their copies written, in one go


class OptunaCopy:
    """Search trials of one fidelity in a storage of Optuna's, feasible ones as complete, others as failed.

    Parameters are those of the space; candidate, number of the trial in the run, fidelity and reason are user
    attributes. Values are in the digits that count on the front, and the later of two trials that are equal there lies
    the smallest possible step behind, so that Optuna's best trials are the run's front. A copy that is damaged, or of
    other objectives or another study, is replaced.
    """

    def __init__(
        self,
        study: Study,
        space: Space[Any],
        objectives: Sequence[str],
        fidelity: Fidelity,
        storage: Storage,
    ) -> None:
        self.storage = storage
        self._study = study
        self._space = space
        self._objectives = tuple(objectives)
        self._fidelity = fidelity
        self._about = {
            "objectives": list(objectives),
            "fidelity": fidelity.text,
            "slots": [parameter.name for parameter in space.parameters()],
            "values": "as on the front",  # copies from before had all digits, and no times
        }
        self._points: set[tuple[float, ...]] = set()  # of the feasible trials in the copy, as on the front
        self._distributions: dict[str, Any] = {}  # by parameter
        self._is_open = False
        self._n_copied = 0
        self._n_seen = 0  # trials of the study that are in the copy or don't belong there

    @property
    def n_missing(self) -> int:
        """Number of trials that are not in the copy yet."""
        return len(self._ours(self._study.trials[self._n_seen :]))

    def catch_up(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Add the study's new trials to the copy, a batch at a time, until `enough`; batches that were added stay.

        Raises:
            Exception: whatever the storage raises; call `close` before the next try, which looks anew.
        """
        if not self._is_open:
            self._open()
        while self._n_seen < len(self._study.trials) and not enough():
            chunk = self._study.trials[self._n_seen : self._n_seen + BATCH]
            trials = [self._frozen(trial) for trial in self._ours(chunk)]
            if trials:
                self.storage.add(trials, self._n_copied)
            self._n_copied += len(trials)
            self._n_seen += len(chunk)

    def close(self) -> None:
        """Close the storage."""
        self._is_open = False
        self.storage.close()

    def _ours(self, trials: Sequence[Trial]) -> list[Trial]:
        return [trial for trial in trials if trial.measurement.fidelity == self._fidelity]

    def _open(self) -> None:
        """Open the existing copy, or make one."""
        self.storage.repair()
        held = None
        try:
            held = self.storage.held()
            known = [] if held is None else self._known(held)
        except self.storage.damage:
            known = None
        if known is None:  # damaged, or of something else
            self.storage.renew()
            held = None
        if held is None:
            copy = self.storage.create([objective(name).direction for name in self._objectives])
            copy.set_user_attr("about", self._about)
            with warnings.catch_warnings(
                category=quiet_optuna().exceptions.ExperimentalWarning, action="ignore"
            ):
                copy.set_metric_names(list(self._objectives))
        self._n_copied = len(known or ())
        self._n_seen = known[-1] + 1 if known else 0
        self._points = {
            self._point(trial)
            for trial in self._ours(self._study.trials[: self._n_seen])
            if trial.measurement.infeasible is None
        }
        self._is_open = True

    def _known(self, held: Held) -> list[int] | None:
        """Numbers of the trials in the copy; None if they are not the first ones of this study."""
        if held.about != self._about:
            return None
        ours = [(t.number, t.measurement.candidate) for t in self._ours(self._study.trials)]
        return [number for number, _ in held.trials] if held.trials == ours[: len(held.trials)] else None

    def _point(self, trial: Trial) -> tuple[float, ...]:
        """Values of the objectives in the digits that count on the front."""
        values = trial.measurement.values
        return tuple(objective(name).rounded(values[name]) for name in self._objectives)

    def _values(self, trial: Trial) -> list[float]:
        """Values as the copy has them: of a trial that equals an earlier one, the first a step worse."""
        point = self._point(trial)
        if point not in self._points:
            self._points.add(point)
            return list(point)
        worse = math.inf * objective(self._objectives[0]).sign
        return [math.nextafter(point[0], worse), *point[1:]]

    def _frozen(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """The trial as Optuna has it."""
        m, library = trial.measurement, quiet_optuna()
        if not self._distributions:
            self._distributions = {p.name: distribution_of(p) for p in self._space.parameters()}
        values = self._space.to_parameters(self._space.parse(m.candidate))
        attributes = {"number": trial.number, "candidate": m.candidate, "fidelity": m.fidelity.text}
        feasible, states = m.infeasible is None, library.trial.TrialState
        now = time.time()  # of runs from before times were recorded
        started, ended = (datetime.fromtimestamp(at or now) for at in (m.started, m.ended))
        # Not by `create_trial`, which checks each parameter: the space's own values are in its own distributions.
        frozen: optuna.trial.FrozenTrial = library.trial.FrozenTrial(
            number=-1,
            trial_id=-1,
            state=states.COMPLETE if feasible else states.FAIL,
            value=None,
            values=self._values(trial) if feasible else None,
            datetime_start=started,
            datetime_complete=ended,
            params=values,
            distributions={name: self._distributions[name] for name in values},
            user_attrs=attributes if feasible else {**attributes, "infeasible": m.infeasible},
            system_attrs={},
            intermediate_values={},
        )
        return frozen
