"""Storages of the mirror: a journal file in the run's directory, or a database that runs share.

Batches are written in the formats that Optuna stores, lines of its journal and rows of its tables; tests compare them
with those of `optuna.Study.add_trials`. That method takes a lock, a flush and a replay for each trial in a journal, and
several statements for each parameter in a database (times: experiments/002-scale).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from secateur.search.controllers.optuna.samplers import quiet_optuna
from secateur.search.mirror.address import engine_options, engine_url, masked_address, reason_of

if TYPE_CHECKING:  # takes a second to import
    import optuna
    import sqlalchemy

JOURNAL, NAME = "optuna.log", "optuna.name"


@dataclass(frozen=True)
class Held:
    """Content of a study in a storage, as far as the mirror compares it.

    Args:
        about: the study's attribute of this name, or None.
        trials: trial number and candidate of each trial, in order.
    """

    about: Any
    trials: list[tuple[int, str]]


class Storage(ABC):
    """Storage of one Optuna study for a run. Methods may raise what the storage raises."""

    damage: tuple[type[Exception], ...] = ()
    """Exceptions of `held` for a study that can't be continued."""

    def __init__(self, text: str) -> None:
        self.text = text  # path or address, for people
        self._study_id = -1  # of the study that was loaded or created
        self._texts: dict[str, tuple[Any, str]] = {}

    @abstractmethod
    def open(self) -> Any:
        """The storage as Optuna takes it."""

    def repair(self) -> None:
        """Remove what a killed writer left behind; only while no other writer is at work."""

    @abstractmethod
    def name(self) -> str | None:
        """Name of the run's study; None before the first one."""

    @abstractmethod
    def new_name(self) -> str:
        """Name for a new study of the run."""

    @abstractmethod
    def renew(self) -> None:
        """Forget the run's study; `create` then makes another."""

    @abstractmethod
    def held(self) -> Held | None:
        """Content of the run's study, to which `add` then appends; None if there is none."""

    @abstractmethod
    def add(self, trials: Sequence[optuna.trial.FrozenTrial], n_known: int) -> None:
        """Append a batch to the study that was loaded or created, which holds `n_known` trials."""

    def close(self) -> None:
        """Close files and connections; `load` opens them again."""

    def reason(self, error: Exception) -> str:
        """Text of an error, for people."""
        return str(error) or type(error).__name__

    def load(self) -> optuna.Study | None:
        """The run's study; None if there is none."""
        name = self.name()
        if name is None:
            return None
        library, storage = quiet_optuna(), self.open()
        try:
            self._study_id = storage.get_study_id_from_name(name)
        except KeyError:
            return None
        study: optuna.Study = library.load_study(
            storage=storage, study_name=name, sampler=library.samplers.RandomSampler()
        )
        return study

    def create(self, directions: Sequence[str]) -> optuna.Study:
        """New study for the run."""
        library, storage, name = quiet_optuna(), self.open(), self.new_name()
        study: optuna.Study = library.create_study(
            storage=storage, study_name=name, directions=directions, sampler=library.samplers.RandomSampler()
        )
        self._study_id = storage.get_study_id_from_name(name)
        return study

    def _text_of(self, name: str, distribution: optuna.distributions.BaseDistribution) -> str:
        """The distribution as JSON, once for all trials that share it: writing it takes longer than all else."""
        known, text = self._texts.get(name, (None, ""))
        if known is not distribution:
            text = quiet_optuna().distributions.distribution_to_json(distribution)
            self._texts[name] = (distribution, text)
        return text


def storage_of(directory: Path, address: str | None) -> Storage:
    """Storage of a run's mirror, by the setting `storage`: a database, or None for the journal."""
    return Journal(directory) if address is None else Database(directory, address)


class Journal(Storage):
    """Journal ``optuna.log`` in the run's directory; a damaged one is replaced."""

    damage = (ValueError, LookupError, TypeError, AttributeError, AssertionError)
    STUDY_NAME = "secateur"
    CREATE_STUDY, DELETE_STUDY, SET_ATTRIBUTE, CREATE_TRIAL = 0, 1, 2, 4  # Optuna's codes of such lines
    WRITER = "secateur"  # no reader of Optuna's has this name

    def __init__(self, directory: Path) -> None:
        self._path = (directory / JOURNAL).absolute()
        super().__init__(str(self._path))

    def open(self) -> Any:
        return quiet_optuna().storages.JournalStorage(self._backend())

    def _backend(self) -> Any:
        journal = quiet_optuna().storages.journal
        lock = journal.JournalFileSymlinkLock(self.text, grace_period=3)
        return journal.JournalFileBackend(self.text, lock_obj=lock)

    def repair(self) -> None:
        """Remove the lock of a writer that is gone, and half a line, to which Optuna would append."""
        self._path.with_name(JOURNAL + ".lock").unlink(missing_ok=True)
        if self._path.exists():
            data = self._path.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                os.truncate(self._path, end)

    def name(self) -> str | None:
        return self.STUDY_NAME if self._path.exists() else None

    def new_name(self) -> str:
        return self.STUDY_NAME

    def renew(self) -> None:
        self._path.unlink(missing_ok=True)

    def held(self) -> Held | None:
        """Read line by line: Optuna would keep parameters and distributions of every trial in memory."""
        if not self._path.exists():
            return None
        names, about, trials = list[str](), None, list[tuple[int, str]]()
        with self._path.open("rb") as file:
            for line in file:
                entry = from_json(line, cache_strings="keys")
                code = entry["op_code"]
                if code == self.CREATE_STUDY:
                    names.append(entry["study_name"])
                elif code == self.DELETE_STUDY:
                    raise ValueError("a study was deleted")
                elif code == self.SET_ATTRIBUTE:
                    about = entry["user_attr"].get("about", about)
                elif code == self.CREATE_TRIAL:
                    attributes = entry["user_attrs"]
                    trials.append((attributes["number"], attributes["candidate"]))
        if not names:
            return None
        self._study_id = names.index(self.STUDY_NAME)
        return Held(about, trials)

    def add(self, trials: Sequence[optuna.trial.FrozenTrial], n_known: int) -> None:
        """In one piece, locked and flushed once."""
        self._backend().append_logs([self._line(trial) for trial in trials])

    def _line(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        values, distributions = trial.values or [], trial.distributions
        several = len(values) > 1
        return {
            "op_code": self.CREATE_TRIAL,
            "worker_id": self.WRITER,
            "study_id": self._study_id,
            "datetime_start": _utc(trial.datetime_start).isoformat(timespec="microseconds"),
            "state": trial.state,
            "value": None if several or not values else values[0],
            "values": values if several else None,
            "datetime_complete": _utc(trial.datetime_complete).isoformat(timespec="microseconds"),
            "distributions": {name: self._text_of(name, d) for name, d in distributions.items()},
            "params": {name: d.to_internal_repr(trial.params[name]) for name, d in distributions.items()},
            "user_attrs": trial.user_attrs,
            "system_attrs": trial.system_attrs,
            "intermediate_values": trial.intermediate_values,
        }


class Database(Storage):
    """Database with Optuna's tables. The run's study is named after its directory and a few random digits.

    The run keeps the name in ``optuna.name``. Nothing is ever deleted: a study that can't be continued stays, and the
    run gets another.
    """

    TABLES = ("studies", "trials", "trial_values", "trial_params", "trial_user_attributes")

    def __init__(self, directory: Path, address: str) -> None:
        super().__init__(masked_address(address))
        self._directory = directory
        self._address = address
        self._storage: optuna.storages.RDBStorage | None = None
        self._tables: Mapping[str, sqlalchemy.Table] = {}

    def open(self) -> optuna.storages.RDBStorage:
        """The storage, its tables made if they are missing."""
        if self._storage is None:
            from sqlalchemy import MetaData

            url, tables = engine_url(self._address), MetaData()
            text = url.render_as_string(hide_password=False)
            text = text.replace("{", "{{").replace("}", "}}")  # Optuna formats it
            storage = quiet_optuna().storages.RDBStorage(text, engine_kwargs=engine_options(url))
            self._storage = storage
            tables.reflect(storage.engine, only=self.TABLES)
            self._tables = tables.tables
        return self._storage

    def name(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / NAME).read_text(encoding="utf-8").strip() or None
        return None

    def new_name(self) -> str:
        """Kept in the run before the study is made."""
        name = self.name() or f"{self._directory.resolve().name}-{secrets.token_hex(4)}"
        (self._directory / NAME).write_text(name + "\n", encoding="utf-8")
        return name

    def renew(self) -> None:
        (self._directory / NAME).unlink(missing_ok=True)

    def held(self) -> Held | None:
        """From two attributes of each trial, without its parameters, which are most of the database."""
        from sqlalchemy import select

        if (copy := self.load()) is None:
            return None
        engine = self.open().engine
        trials, attributes = self._tables["trials"], self._tables["trial_user_attributes"]
        query = (
            select(trials.c.number, attributes.c.key, attributes.c.value_json)
            .join_from(trials, attributes, isouter=True)
            .where(trials.c.study_id == self._study_id)
            .order_by(trials.c.number)
        )
        found: dict[int, dict[str, Any]] = {}
        with engine.connect() as connection:
            for number, key, text in connection.execute(query):
                found.setdefault(number, {})[key] = json.loads(text or "null")
        ours = [(one.get("number", -1), one.get("candidate", "")) for one in found.values()]
        return Held(copy.user_attrs.get("about"), ours)

    def add(self, trials: Sequence[optuna.trial.FrozenTrial], n_known: int) -> None:
        """In one transaction of a few statements."""
        from sqlalchemy import func, insert, select

        engine = self.open().engine
        studies, table = self._tables["studies"], self._tables["trials"]
        ours = table.c.study_id == self._study_id
        with engine.begin() as connection:
            locked = select(studies).where(studies.c.study_id == self._study_id).with_for_update()
            connection.execute(locked)  # as Optuna locks it
            if (n_found := connection.scalar(select(func.count()).where(ours))) != n_known:
                raise RuntimeError(f"Expected {n_known} trials in {self.name()}, got {n_found}.")
            rows = [self._trial_row(number, trial) for number, trial in enumerate(trials, start=n_known)]
            connection.execute(insert(table), rows)
            new = select(table.c.trial_id).where(ours, table.c.number >= n_known).order_by(table.c.number)
            pairs = list(zip(connection.scalars(new), trials, strict=True))
            for name, rows_of in (
                ("trial_values", _value_rows),
                ("trial_params", self._param_rows),
                ("trial_user_attributes", _attribute_rows),
            ):
                if rows := [{"trial_id": i, **row} for i, trial in pairs for row in rows_of(trial)]:
                    connection.execute(insert(self._tables[name]), rows)

    def _trial_row(self, number: int, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        start, end = (_utc(at).replace(tzinfo=None) for at in (trial.datetime_start, trial.datetime_complete))
        known = {"study_id": self._study_id, "number": number, "state": trial.state.name}
        return known | {"datetime_start": start, "datetime_complete": end}

    def _param_rows(self, trial: optuna.trial.FrozenTrial) -> Iterator[dict[str, Any]]:
        for name, distribution in trial.distributions.items():
            value = distribution.to_internal_repr(trial.params[name])
            text = self._text_of(name, distribution)
            yield {"param_name": name, "param_value": value, "distribution_json": text}

    def close(self) -> None:
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
            self._storage = None

    def reason(self, error: Exception) -> str:
        return reason_of(error, self._address)


def _value_rows(trial: optuna.trial.FrozenTrial) -> Iterator[dict[str, Any]]:
    for objective, value in enumerate(trial.values or ()):  # finite, as all measurements
        yield {"objective": objective, "value": value, "value_type": "FINITE"}


def _attribute_rows(trial: optuna.trial.FrozenTrial) -> Iterator[dict[str, Any]]:
    for key, value in trial.user_attrs.items():
        yield {"key": key, "value_json": json.dumps(value)}


def _utc(time: datetime | None) -> datetime:
    assert time is not None  # the trial is finished
    return time.astimezone(UTC)
