"""Run directory in the hands of a driver: locked from before the model is loaded, with its state and its log."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.loop.loop import Observer, Outcome
from secateur.search.mirror.address import masked
from secateur.search.study.about import ABOUT, check_before
from secateur.search.study.lock import RunLock
from secateur.search.study.state import LOG, STATE, State, write_state
from secateur.spaces.limited_text import cut, without_controls

LOG_S = 30.0
"""Seconds between lines of one kind in the log."""

LONGEST = 600  # characters of a reason


class DrivenRun(Observer):
    """Lock, state and log of a run, from before its model is loaded to its end; a context manager and an observer.

    A new run that is refused, or interrupted, before it has a study leaves the directory as it was.

    Args:
        directory: of the run; made if it is missing.
        identity: of the search as far as settings tell, to be compared with that of a study in the directory.

    Raises:
        UsageError: if the directory holds another search, or other files.
        BusyError: if another driver holds it.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        check_before(directory, identity)
        self._directory = directory
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(directory)
        self._ended = False
        self._last: dict[str, float] = {}  # time of the last line of each kind

    def __enter__(self) -> DrivenRun:
        self._write_log("started")
        write_state(self._directory, "preparing")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._end_by(error)
        finally:
            self.lock.close()

    def _end_by(self, error: BaseException) -> None:
        stopped = isinstance(error, KeyboardInterrupt)
        if not (self._directory / ABOUT).exists() and (stopped or isinstance(error, UsageError)):
            self._leave_as_before()
            return
        reason = "interrupted" if stopped else cut(without_controls(masked(_words(error))), LONGEST)
        with contextlib.suppress(OSError, UsageError):  # a full disk, of which the error tells already
            self._write_log(f"{'stopped' if stopped else 'failed'}: {reason}")
            write_state(self._directory, "stopped" if stopped else "failed", reason)

    def _leave_as_before(self) -> None:
        for name in (STATE, LOG, RunLock.NAME):
            (self._directory / name).unlink(missing_ok=True)
        for path in self._made:
            with contextlib.suppress(OSError):  # somebody else put something there
                path.rmdir()

    def telling(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """The function for progress, which writes it into the log, too; while preparing the state's reason."""

        def told(line: str) -> None:
            self._log(line)
            say(line)

        return told

    def _log(self, line: str) -> None:
        """Write a line, unless one of its kind, that differs in numbers alone, was written just now."""
        kind, now = re.sub(r"\d+", "", line), time.monotonic()
        if now - self._last.get(kind, -LOG_S) >= LOG_S:
            self._last[kind] = now
            self._write_log(line)

    def _write_log(self, line: str) -> None:
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        text = " ".join(without_controls(masked(line)).split())
        with (
            contextlib.suppress(OSError),
            (self._directory / LOG).open("a", encoding="utf-8") as file,
        ):
            file.write(f"{stamp} {text}\n")

    def end(self, outcome: Outcome) -> None:
        """Set the last state: finished, or stopped before the budget was used up."""
        state: State = "stopped" if outcome.reason == "stopped" else "finished"
        self._write_log(f"{state}: {outcome.why}")
        write_state(self._directory, state, outcome.why)

    # --- as an observer of the search ---

    def on_start(self, n_known: int, budget: Budget) -> None:
        self._write_log(f"searching, {n_known} measurements known")
        write_state(self._directory, "running")

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        self._log(f"searching: {spent.evaluations} evaluations, {spent.tokens:,} tokens")

    def on_end(self, outcome: Outcome) -> None:
        spent = outcome.spent
        self._write_log(
            f"search ended, {outcome.why}: {spent.evaluations} evaluations, {spent.tokens:,} tokens"
        )


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
