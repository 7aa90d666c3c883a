"""A study: everything that was measured in one search, kept in a directory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur.search.asks import AskLog
from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.journal import JournalWriter, StudyWriteError, no_room, read_journal
from secateur.search.lock import RunLock
from secateur.search.yaml_file import dump_yaml, read_yaml
from secateur.spaces.measurement import Measurement, Part

FORMAT = 1
ABOUT, SETTINGS, MEASUREMENTS = "study.json", "settings.yaml", "measurements.jsonl"

__all__ = ["About", "Spent", "Study", "StudyWriteError", "trials_of"]


@dataclass(frozen=True)
class About:
    """What a study is a study of.

    Args:
        identity: plain nested values that measurements depend on: see `settings.identity`, and with it
            fingerprints of the model and the data. A study is continued only with the same ones.
        baselines: canonical texts of the baselines by name, ``dense`` among them.
        facts: plain values worth keeping, such as versions; they may differ when the study is continued.
    """

    identity: Mapping[str, Any]
    baselines: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spent:
    """How much work some measurements were.

    Args:
        evaluations: how many there are, closed forms not counted.
        tokens: evaluated for them, nominal.
        seconds: spent on them, summed over workers.
        blocks: model blocks computed.
        blocks_saved: model blocks that were shared.
    """

    evaluations: int = 0
    tokens: int = 0
    seconds: float = 0.0
    blocks: int = 0
    blocks_saved: int = 0

    def plus(self, trials: Iterable[Trial]) -> Spent:
        """This and the work of the trials."""
        spent = (self.evaluations, self.tokens, self.seconds, self.blocks, self.blocks_saved)
        for trial in trials:
            m = trial.measurement
            one = (m.fidelity.n_evaluations, m.n_tokens, m.seconds, m.blocks, m.blocks_saved)
            spent = tuple(a + b for a, b in zip(spent, one, strict=True))  # type: ignore[assignment]
        return Spent(*spent)


def trials_of(trials: Iterable[Trial], *parts: Part) -> list[Trial]:
    """The trials of some parts, e.g. ``"test"``."""
    return [trial for trial in trials if trial.measurement.fidelity.part in parts]


class Study:
    """The trials of one search, in the order of its file of measurements.

    Made by `open_or_create` for the one driver that writes it, or by `open` for readers, who see it as it
    is at that moment. A context manager; leaving it lets the next driver in.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], about: About) -> None:
        self.directory = directory
        self.settings = settings
        self.about = about
        self.warnings: tuple[str, ...] = ()
        self._trials: list[Trial] = []
        self._by_key: dict[tuple[str, str], Trial] = {}
        self._n_bytes = 0  # of the measurements that were read
        self._writer: JournalWriter | None = None
        self._lock: RunLock | None = None
        self._asks: AskLog | None = None

    @classmethod
    def open(cls, directory: str | Path) -> Study:
        """A study to read from; nothing is locked or written, and a driver may be writing it.

        Raises:
            UsageError: if the directory holds no study, or a damaged one.
        """
        directory = Path(directory)
        if not (directory / ABOUT).is_file():
            raise UsageError(
                f"Expected a run directory with {ABOUT}, got {directory}. Make one with a search."
            )
        about, path = _read_about(directory), directory / SETTINGS
        settings = read_yaml(path) if path.exists() else {}
        study = cls(directory, settings if isinstance(settings, dict) else {}, about)
        study.refresh()
        return study

    @classmethod
    def open_or_create(cls, directory: str | Path, settings: Mapping[str, Any], about: About) -> Study:
        """The study to write to: a new one in a new or empty directory, or the one that is there, continued.

        A torn last line is cut off, and a warning about it left in `warnings`.

        Args:
            directory: made if it is missing.
            settings: all of them, as plain values; kept for readers.
            about: what the search is about; plain values.

        Raises:
            UsageError: if the directory holds another search or something else, a damaged file, or a study
                that another driver is writing. The directory is then left as it was.
        """
        directory = Path(directory)
        about = About(**json.loads(json.dumps(vars(about), default=dict)))  # as a reader will see it
        _check_directory(directory, about.identity)
        directory.mkdir(parents=True, exist_ok=True)
        lock = RunLock(directory)
        try:
            _check_directory(directory, about.identity)  # again: it may have been made meanwhile
            content = read_journal(directory / MEASUREMENTS)
            _replace(directory / ABOUT, _about_text(about))
            _replace(directory / SETTINGS, dump_yaml(dict(settings)))
            study = cls(directory, dict(settings), about)
            study._writer = JournalWriter(directory / MEASUREMENTS, content.n_bytes)
        except BaseException:
            lock.close()
            raise
        study._lock = lock
        study._remember(content.measurements)
        if content.n_torn:
            study.warnings = (
                f"Cut off {content.n_torn} bytes of an unfinished line in {directory / MEASUREMENTS}; "
                f"{len(study.trials)} measurements are whole.",
            )
        return study

    def name_baselines(self, baselines: Mapping[str, str]) -> None:
        """Keep for readers which candidates are baselines, once all are known.

        Args:
            baselines: canonical texts by name.
        """
        self.about = replace(self.about, baselines=dict(baselines))
        _replace(self.directory / ABOUT, _about_text(self.about))

    @property
    def trials(self) -> Sequence[Trial]:
        """All trials, each at the index that is its number. Not to be changed."""
        return self._trials

    @property
    def spent(self) -> Spent:
        """The work of the search: its measurements, and the closed forms that screened for it."""
        return Spent().plus(trials_of(self._trials, "search", "proxy"))

    def lookup(self, key: tuple[str, str]) -> Trial | None:
        """The trial with this (candidate, fidelity), both as text."""
        return self._by_key.get(key)

    def append(self, measurements: Sequence[Measurement]) -> list[Trial]:
        """Keep a batch: when this returns, it is on the disk.

        Raises:
            RuntimeError: if the study was opened for reading, or is closed.
            ValueError: if something was measured before.
            StudyWriteError: if the disk is full; none of the batch is kept then.
        """
        if self._writer is None:
            raise RuntimeError("Expected a study that is open for writing. Use `Study.open_or_create`.")
        if not measurements:
            return []
        keys = [m.key for m in measurements]
        twice = [key for i, key in enumerate(keys) if key in self._by_key or key in keys[:i]]
        if twice:
            raise ValueError(f"Expected measurements that are new to the study, got {twice[0]} again.")
        return self._remember(self._writer.append(measurements, n_safe=len(self._trials)))

    def asks(self, about: Mapping[str, Any]) -> AskLog:
        """The log of an asynchronous search by the controller that the plain values are about.

        Raises:
            RuntimeError: if the study was opened for reading, or is closed.
        """
        if self._writer is None:
            raise RuntimeError("Expected a study that is open for writing. Use `Study.open_or_create`.")
        if self._asks is not None:
            self._asks.close()
        self._asks = AskLog(self.directory / AskLog.NAME, about, len(self._trials))
        return self._asks

    def refresh(self) -> list[Trial]:
        """Read what its driver has added since; for a study that is open for reading.

        Returns:
            The new trials.

        Raises:
            UsageError: if the file is damaged.
        """
        content = read_journal(self.directory / MEASUREMENTS, self._n_bytes)
        self._n_bytes = content.n_bytes
        return self._remember([m for m in content.measurements if m.key not in self._by_key])

    def _remember(self, measurements: Iterable[Measurement]) -> list[Trial]:
        first = len(self._trials)
        for measurement in measurements:
            trial = Trial(len(self._trials), measurement)
            self._trials.append(trial)
            self._by_key[measurement.key] = trial
        return self._trials[first:]

    def close(self) -> None:
        """Let the next driver in. May be called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._asks is not None:
            self._asks.close()
            self._asks = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Study:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_directory(directory: Path, identity: Mapping[str, Any]) -> None:
    """Refuse what is neither new nor the same search, touching nothing."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"Expected a run directory, got the file {directory}. Name another.")
    if not (directory / ABOUT).exists():
        own = {RunLock.NAME, ABOUT + ".new"}  # left by a driver that was killed at once
        names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
        others = [name for name in names if name not in own]
        if others:
            raise UsageError(
                f"Expected a new, an empty or a run directory, got {directory} with {others[0]} and no {ABOUT}. "
                f"Name another."
            )
        return
    old, new = _flat(_read_about(directory).identity), _flat(identity)
    changed = [key for key in [*old, *new] if old.get(key, "absent") != new.get(key, "absent")]
    if changed:
        shown = "; ".join(
            f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in dict.fromkeys(changed)
        )
        raise UsageError(
            f"Expected the search that {directory} belongs to, got another ({shown}). "
            f"Undo the change, or name another directory."
        )


def _about_text(about: About) -> str:
    return json.dumps({"format": FORMAT, **vars(about)}, indent=1) + "\n"


def _read_about(directory: Path) -> About:
    path = directory / ABOUT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        about = About(**content) if version == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"Expected the description of a study in {path}, got {error!r}.") from None
    if about is None:
        raise UsageError(
            f"Expected {path} of format {FORMAT}, got {version!r}. Use the Secateur that made it."
        )
    return about


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _replace(path: Path, text: str) -> None:
    """Write the file whole or not at all; an equal one is left alone."""
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    new = path.with_name(path.name + ".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise no_room(error, path, "nothing was changed") from error
    new.replace(path)
