"""Where the mirror is kept: a journal file in the run's directory, or a database that runs share."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from secateur.search.mirror.address import engine_options, engine_url, masked, reason_of
from secateur.search.mirror.raw_trials import RawTrials

if TYPE_CHECKING:  # takes a second to import
    import optuna

JOURNAL, NAME = "optuna.log", "optuna.name"


class Storage(Protocol):
    """Holds one study of Optuna's for a run. Methods but `text` may raise what the storage raises.

    Attributes:
        text: where it is, for people.
        damage: exceptions of `load` and `known` that mean a study that can't be continued.
    """

    text: str
    damage: tuple[type[Exception], ...]

    def open(self) -> Any:
        """As Optuna knows it."""

    def repair(self) -> None:
        """Mend what a writer that was killed has left. For the one writer alone."""

    def load(self) -> optuna.Study | None:
        """The run's study, if there is one."""

    def create(self, directions: Sequence[str]) -> optuna.Study:
        """A new study for the run."""

    def renew(self) -> None:
        """Forget the run's study, so that `create` can make another."""

    def known(self, copy: optuna.Study) -> list[tuple[int, str]]:
        """Trial number and candidate of each of the study's trials, in order."""

    def add(self, copy: optuna.Study, trials: Sequence[optuna.trial.FrozenTrial], n_known: int) -> None:
        """Add a batch to a study that holds so many trials."""

    def close(self) -> None:
        """Let go of files and connections; `load` takes them up again."""

    def reason(self, error: Exception) -> str:
        """What an error says, for people."""


def storage_of(directory: Path, address: str | None) -> Storage:
    """Where a run is mirrored.

    Args:
        directory: of the run.
        address: the setting `storage`; None for the journal.
    """
    return Journal(directory) if address is None else Database(directory, address)


class Journal:
    """The file ``optuna.log``, which is the run's own: a damaged one is made anew."""

    damage: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError, AssertionError)
    STUDY_NAME = "secateur"

    def __init__(self, directory: Path) -> None:
        self._path = (directory / JOURNAL).absolute()
        self._raw = RawTrials()
        self.text = str(self._path)

    def repair(self) -> None:
        """Remove the lock of a writer that is gone, and half a line, to which Optuna would append."""
        self._path.with_name(JOURNAL + ".lock").unlink(missing_ok=True)
        if self._path.exists():
            data = self._path.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                os.truncate(self._path, end)

    def load(self) -> optuna.Study | None:
        return _load(self.open(), self.STUDY_NAME) if self._path.exists() else None

    def create(self, directions: Sequence[str]) -> optuna.Study:
        return _create(self.open(), self.STUDY_NAME, directions)

    def renew(self) -> None:
        self._path.unlink(missing_ok=True)

    def known(self, copy: optuna.Study) -> list[tuple[int, str]]:
        found = [trial.user_attrs for trial in copy.get_trials(deepcopy=False)]
        return [(attributes["number"], attributes["candidate"]) for attributes in found]

    def add(self, copy: optuna.Study, trials: Sequence[optuna.trial.FrozenTrial], n_known: int) -> None:
        """In one piece, locked and flushed once."""
        self._backend().append_logs([self._raw.journal_line(copy._study_id, trial) for trial in trials])

    def close(self) -> None:
        """It is open only while it is read or written."""

    def reason(self, error: Exception) -> str:
        return str(error) or type(error).__name__

    def open(self) -> optuna.storages.JournalStorage:
        from optuna.storages.journal import JournalStorage

        return JournalStorage(self._backend())

    def _backend(self) -> optuna.storages.journal.JournalFileBackend:
        from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

        path = str(self._path)
        return JournalFileBackend(path, lock_obj=JournalFileSymlinkLock(path, grace_period=3))


class Database:
    """A database with Optuna's tables. The run's study is named after its directory and a few random digits.

    The name is kept in the run, in ``optuna.name``. Nothing is ever deleted: a study that can't be continued stays,
    and the run gets another.

    Args:
        directory: of the run.
        address: see `address.engine_url`.
    """

    damage: tuple[type[Exception], ...] = ()

    def __init__(self, directory: Path, address: str) -> None:
        self.text = masked(address)
        self._directory = directory
        self._address = address
        self._raw = RawTrials()
        self._storage: optuna.storages.RDBStorage | None = None

    def repair(self) -> None:
        """Transactions are whole."""

    def load(self) -> optuna.Study | None:
        name = self._name()
        return _load(self.open(), name) if name else None

    def create(self, directions: Sequence[str]) -> optuna.Study:
        name = self._name() or f"{self._directory.resolve().name}-{secrets.token_hex(4)}"
        (self._directory / NAME).write_text(name + "\n", encoding="utf-8")
        return _create(self.open(), name, directions)

    def renew(self) -> None:
        (self._directory / NAME).unlink(missing_ok=True)

    def known(self, copy: optuna.Study) -> list[tuple[int, str]]:
        import sqlalchemy
        from optuna.storages._rdb.models import TrialModel, TrialUserAttributeModel

        storage = self.open()
        query = (
            sqlalchemy.select(
                TrialModel.number, TrialUserAttributeModel.key, TrialUserAttributeModel.value_json
            )
            .join_from(TrialModel, TrialUserAttributeModel, isouter=True)
            .where(TrialModel.study_id == storage.get_study_id_from_name(copy.study_name))
        )
        with storage.engine.connect() as connection:
            rows = connection.execute(query).all()
        found: dict[int, dict[str, Any]] = {
            number: {} for number, _, _ in sorted(rows, key=lambda row: row[0])
        }
        for number, key, text in rows:
            found[number][key] = json.loads(text or "null")
        return [(one.get("number", -1), one.get("candidate", "")) for one in found.values()]

    def add(self, copy: optuna.Study, trials: Sequence[optuna.trial.FrozenTrial], n_known: int) -> None:
        """In one transaction, and a few statements."""
        from optuna.storages._rdb import models
        from sqlalchemy import func, insert, orm, select

        storage = self.open()
        study_id = storage.get_study_id_from_name(copy.study_name)
        with orm.Session(storage.engine) as session, session.begin():
            session.get(models.StudyModel, study_id, with_for_update=True)  # as Optuna locks it
            count = select(func.count()).where(models.TrialModel.study_id == study_id)
            if (n_found := session.scalar(count)) != n_known:
                raise RuntimeError(f"Expected {n_known} trials in {copy.study_name}, got {n_found}.")
            rows = [self._raw.trial_row(study_id, n_known + i, trial) for i, trial in enumerate(trials)]
            session.add_all(rows)
            session.flush()  # which gives them their ids
            ids = [row.trial_id for row in rows]
            for model, of in (
                (models.TrialValueModel, self._raw.value_rows),
                (models.TrialParamModel, self._raw.param_rows),
            ):
                parts = [{"trial_id": i, **part} for i, t in zip(ids, trials, strict=True) for part in of(t)]
                if parts:
                    session.execute(insert(model), parts)
            attributes = [
                {"trial_id": i, "key": key, "value_json": json.dumps(value)}
                for i, trial in zip(ids, trials, strict=True)
                for key, value in trial.user_attrs.items()
            ]
            session.execute(insert(models.TrialUserAttributeModel), attributes)

    def close(self) -> None:
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
            self._storage = None

    def reason(self, error: Exception) -> str:
        return reason_of(error, self._address)

    def _name(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / NAME).read_text(encoding="utf-8").strip() or None
        return None

    def open(self) -> optuna.storages.RDBStorage:
        """The storage, its tables made if they are missing."""
        if self._storage is None:
            url = engine_url(self._address)
            text = url.render_as_string(hide_password=False)
            text = text.replace("{", "{{").replace("}", "}}")  # Optuna formats it
            self._storage = quiet_optuna().storages.RDBStorage(text, engine_kwargs=engine_options(url))
        return self._storage


def quiet_optuna() -> Any:
    """Optuna without its log of every trial; it takes a second to import."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _load(storage: Any, name: str) -> optuna.Study | None:
    library = quiet_optuna()
    try:
        storage.get_study_id_from_name(name)
    except KeyError:
        return None
    study: optuna.Study = library.load_study(
        storage=storage, study_name=name, sampler=library.samplers.RandomSampler()
    )
    return study


def _create(storage: Any, name: str, directions: Sequence[str]) -> optuna.Study:
    library = quiet_optuna()
    study: optuna.Study = library.create_study(
        storage=storage, study_name=name, directions=directions, sampler=library.samplers.RandomSampler()
    )
    return study
