"""Study: all measurements of one search, kept in a directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.search.budget import Spent
from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.files import dump_yaml, read_yaml, replace_file
from secateur.search.study.about import ABOUT, About, about_text, check_directory, read_about
from secateur.search.study.asks import AskLog
from secateur.search.study.checksum import Checksum
from secateur.search.study.journal import FLUSH_S, Appender, read_journal
from secateur.search.study.lock import RunLock
from secateur.spaces.measurement import SEARCHED, Fidelity, Measurement, Part

SETTINGS, MEASUREMENTS = "settings.yaml", "measurements.jsonl"


def _timed(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements with the time of day of their batch: its end is now, for each worker its work lies before."""
    now, busy = time.time(), dict.fromkeys((m.worker for m in measurements), 0.0)
    for measurement in measurements:
        busy[measurement.worker] += measurement.seconds
    return [replace(m, started=now - busy[m.worker], ended=now) for m in measurements]


def trials_of(trials: Iterable[Trial], *parts: Part) -> list[Trial]:
    """Trials of some parts, e.g. ``"test"``."""
    return [trial for trial in trials if trial.measurement.fidelity.part in parts]


class Study:
    """Trials of one search, in the order of its file of measurements.

    Made by `open_or_create` for the one driver that writes it, or by `open` for readers, who see it as it
    is at that moment. A context manager, whose exit releases the lock.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], about: About) -> None:
        self.directory = directory
        self.settings = settings
        self.about = about
        self.warnings: tuple[str, ...] = ()
        self.n_unchanged = 0  # trials from the first on that are as their driver wrote them
        self._trials: list[Trial] = []
        self._by_key: dict[tuple[str, str], Trial] = {}
        self.fidelities: dict[Fidelity, None] = {}  # of the trials, each once
        self._n_bytes = 0  # of the measurements that were read
        self._writer: Appender | None = None
        self._checksum: Checksum | None = None  # from the first append on, when all lines were checked
        self._lock: RunLock | None = None
        self._asks: AskLog | None = None

    @classmethod
    def open(cls, directory: str | Path) -> Study:
        """Study to read from, also while a driver writes it; nothing is locked or written.

        Raises:
            UsageError: if the directory holds no study, or a damaged one.
        """
        study = cls.without_trials(directory)
        study.refresh()
        return study

    @classmethod
    def without_trials(cls, directory: str | Path) -> Study:
        """Study with its description and settings, whose measurements `refresh` reads.

        Raises:
            UsageError: if the directory holds no study, or one with a damaged description or settings.
        """
        directory = Path(directory)
        if not (directory / ABOUT).is_file():
            raise UsageError(
                f"Expected a run directory with {ABOUT}, got {directory}. Make one with a search."
            )
        about, path = read_about(directory), directory / SETTINGS
        settings = read_yaml(path) if path.exists() else {}
        if not isinstance(settings, dict):
            raise UsageError(f"Expected keys and values in {path}, got {settings!r:.40}. Restore the file.")
        return cls(directory, settings, about)

    @classmethod
    def open_or_create(
        cls, directory: str | Path, settings: Mapping[str, Any], about: About, lock: RunLock | None = None
    ) -> Study:
        """Study to write to: a new one in a new or empty directory, or the existing one, continued.

        A torn last line is cut off, and a warning about it left in `warnings`.

        Args:
            directory: made if it is missing.
            settings: all of them, as plain values; kept for readers.
            about: description of the search, plain values.
            lock: of the directory, held by the caller; None: the study takes it itself.

        Raises:
            UsageError: if the directory holds another search, other files, a damaged file, or a study that another
                driver is writing. The directory is then unchanged.
        """
        directory = Path(directory)
        about = About(**json.loads(json.dumps(vars(about), default=dict)))  # as it will be read back
        check_directory(directory, about.identity)
        directory.mkdir(parents=True, exist_ok=True)
        own = RunLock(directory) if lock is None else None
        try:
            check_directory(directory, about.identity)  # again: it may have been made meanwhile
            content = read_journal(directory / MEASUREMENTS)
            replace_file(directory / ABOUT, about_text(about))
            replace_file(directory / SETTINGS, dump_yaml(dict(settings)))
            study = cls(directory, dict(settings), about)
            study._writer = Appender(directory / MEASUREMENTS, content.n_bytes, flush_s=FLUSH_S)
        except BaseException:
            if own is not None:
                own.close()
            raise
        study._lock = own
        study._n_bytes, study.n_unchanged = content.n_bytes, content.n_unchanged
        study._remember(content.measurements)
        if content.n_torn:
            study.warnings = (
                f"Cut off {content.n_torn} bytes of an unfinished line in {directory / MEASUREMENTS}; "
                f"{len(study.trials)} measurements are whole.",
            )
        return study

    def name_baselines(self, baselines: Mapping[str, str]) -> None:
        """Add the baselines (canonical texts by name) to the description, once all are known."""
        self.about = replace(self.about, baselines=dict(baselines))
        replace_file(self.directory / ABOUT, about_text(self.about))

    @property
    def trials(self) -> Sequence[Trial]:
        """All trials, the index being the number; read-only."""
        return self._trials

    @property
    def spent(self) -> Spent:
        """Work of the search: its measurements, and the closed forms of screening."""
        return Spent().plus(trials_of(self._trials, *SEARCHED))

    def lookup(self, key: tuple[str, str]) -> Trial | None:
        """Trial of this (candidate, fidelity), both as text; None if there is none."""
        return self._by_key.get(key)

    def append(self, measurements: Sequence[Measurement]) -> list[Trial]:
        """Append a batch, which from then on survives the process, and from the next flush on the machine.

        Raises:
            RuntimeError: if the study was opened for reading, or is closed.
            ValueError: if something was measured before, or a value is out of range; nothing is written then.
            StudyWriteError: if the disk is full; none of the batch is kept then.
        """
        writer = self._open_writer()
        if not measurements:
            return []
        keys = [m.key for m in measurements]
        twice = [key for i, key in enumerate(keys) if key in self._by_key or key in keys[:i]]
        if twice:
            raise ValueError(f"Expected measurements that are new to the study, got {twice[0]} again.")
        measurements = _timed(measurements)
        lines = [json.dumps(m.to_json(), ensure_ascii=False, allow_nan=False) for m in measurements]
        as_read = [Measurement.from_json(json.loads(line)) for line in lines]
        if self._checksum is None:
            path = self.directory / MEASUREMENTS
            with suppress(OSError):  # no reason to lose a measurement
                self._checksum = Checksum(path, self._n_bytes)
        writer.append(lines, f"{len(self._trials)} measurements are safe")
        if self._checksum is not None:
            self._checksum.add(lines)
        return self._remember(as_read)

    def asks(self, about: Mapping[str, Any]) -> AskLog:
        """Log of asks of the controller that the plain values describe.

        Raises:
            RuntimeError: if the study was opened for reading, or is closed.
        """
        self._open_writer()
        if self._asks is not None:
            self._asks.close()
        self._asks = AskLog(self.directory / AskLog.NAME, about, len(self._trials))
        return self._asks

    def _open_writer(self) -> Appender:
        if self._writer is None:
            raise RuntimeError("Expected a study that is open for writing. Use `Study.open_or_create`.")
        return self._writer

    def refresh(self) -> list[Trial]:
        """Read the measurements that a driver has added since, into a study that is open for reading.

        Raises:
            UsageError: if the file is damaged.
        """
        content = read_journal(self.directory / MEASUREMENTS, self._n_bytes, self._by_key)
        self._n_bytes = content.n_bytes
        self.n_unchanged = max(self.n_unchanged, content.n_unchanged)
        return self._remember(content.measurements)

    def _remember(self, measurements: Iterable[Measurement]) -> list[Trial]:
        new = [Trial(number, m) for number, m in enumerate(measurements, start=len(self._trials))]
        self._trials += new
        self._by_key.update((trial.measurement.key, trial) for trial in new)
        several = {id(trial.measurement.fidelity): trial.measurement.fidelity for trial in new}
        self.fidelities |= dict.fromkeys(several.values())
        return new

    def close(self) -> None:
        """Close the files and release the lock, whatever happens. May be called twice.

        Raises:
            StudyWriteError: if there is no room for what was not flushed to the disk yet.
        """
        writer, asks, lock = self._writer, self._asks, self._lock
        self._writer = self._asks = self._lock = None
        if self._checksum is not None:
            self._checksum.write()
            self._checksum = None
        with ExitStack() as last_first:
            for part in (lock, asks, writer):
                if part is not None:
                    last_first.callback(part.close)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
