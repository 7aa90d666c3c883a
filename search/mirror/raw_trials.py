"""A finished trial as Optuna's storages keep it, rows of its tables or a line of its journal.

Optuna's own way in adds one trial at a time: several statements a parameter, or a lock, a flush and a second reading.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # takes a second to import
    import optuna

WRITER = "secateur"  # in a journal's lines; no reader of Optuna's has this name


class RawTrials:
    """What trials of one study become."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[Any, str]] = {}  # of the last distribution of each parameter

    def trial_row(self, study_id: int, number: int, trial: optuna.trial.FrozenTrial) -> Any:
        """Of the table of trials."""
        from optuna.storages._rdb.models import TrialModel

        return TrialModel(
            study_id=study_id,
            number=number,
            state=trial.state,
            datetime_start=trial.datetime_start,
            datetime_complete=trial.datetime_complete,
        )

    def value_rows(self, trial: optuna.trial.FrozenTrial) -> list[dict[str, Any]]:
        """Of the table of objectives' values, without the trial's id."""
        from optuna.storages._rdb.models import TrialValueModel

        stored = [TrialValueModel.value_to_stored_repr(value) for value in trial.values or ()]
        return [{"objective": i, "value": v, "value_type": kind} for i, (v, kind) in enumerate(stored)]

    def param_rows(self, trial: optuna.trial.FrozenTrial) -> list[dict[str, Any]]:
        """Of the table of parameters, without the trial's id."""
        return [
            {
                "param_name": name,
                "param_value": distribution.to_internal_repr(trial.params[name]),
                "distribution_json": self._text(name, distribution),
            }
            for name, distribution in trial.distributions.items()
        ]

    def journal_line(self, study_id: int, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        """What a journal's backend takes for it."""
        from optuna.storages.journal._storage import JournalOperation

        values, distributions, params = trial.values or [], trial.distributions, trial.params
        several = len(values) > 1
        return {
            "op_code": JournalOperation.CREATE_TRIAL,
            "worker_id": WRITER,
            "study_id": study_id,
            "datetime_start": _instant(trial.datetime_start),
            "state": trial.state,
            "value": None if several or not values else values[0],
            "values": values if several else None,
            "datetime_complete": _instant(trial.datetime_complete),
            "distributions": {name: self._text(name, d) for name, d in distributions.items()},
            "params": {name: d.to_internal_repr(params[name]) for name, d in distributions.items()},
            "user_attrs": trial.user_attrs,
            "system_attrs": trial.system_attrs,
            "intermediate_values": trial.intermediate_values,
        }

    def _text(self, name: str, distribution: optuna.distributions.BaseDistribution) -> str:
        """A parameter's distribution is the same object in all trials: writing it takes longer than all else."""
        known, text = self._texts.get(name, (None, ""))
        if known is not distribution:
            from optuna.distributions import distribution_to_json

            text = distribution_to_json(distribution)
            self._texts[name] = (distribution, text)
        return text


def _instant(time: datetime | None) -> str:
    assert time is not None  # the trial is finished
    return time.astimezone(UTC).isoformat(timespec="microseconds")
