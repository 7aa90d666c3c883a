"""Mirror of a study, kept up to date by a thread of its own, so that no search waits for it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Trial
from secateur.search.loop.loop import Observer, Outcome
from secateur.search.mirror.optuna_copy import OptunaCopy

GATHER_S = 1.0  # what comes within this time is written in one go
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
PATIENCE_S = 30.0  # to catch up when the search has ended


class Mirror(Observer):
    """Observer of a search that updates Optuna's copy; a context manager, whose exit ends the thread.

    Trials are written at most once a second. After an error of the storage the next try follows after a second, then
    after ever longer pauses; one message reports the lag, and another that the mirror has caught up. At the end of the
    search it has `patience` seconds for the missing trials; the next search or dashboard of the run adds the rest.

    Args:
        copy: of a study that is open for writing, so that nobody else writes the copy; used by the thread alone.
        say: called with messages, in the driver's thread.
        pause: seconds until the second try.
        patience: seconds for missing trials at the end.
    """

    def __init__(
        self,
        copy: OptunaCopy,
        say: Callable[[str], None],
        *,
        pause: float = FIRST_PAUSE_S,
        patience: float = PATIENCE_S,
    ) -> None:
        self._copy = copy
        self._say = say
        self._first_pause = pause
        self._patience = patience
        self._trouble = ""  # why the mirror lags; empty while it doesn't
        self._unsaid: deque[str] = deque()
        self._work = threading.Event()
        self._ending = threading.Event()  # one more try, then end
        self._abandoned = threading.Event()  # end, whatever is missing
        # A daemon: a database that hangs must not keep a process alive whose search has ended.
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            self._abandoned.set()
        self._ending.set()
        self._work.set()
        self._thread.join(self._patience if kind is None else min(self._patience, 1.0))
        self._abandoned.set()
        self._report()
        n_missing = self._copy.n_missing
        if n_missing and kind is None:
            reason = f" ({self._trouble})" if self._trouble else ""
            self._say(
                f"the mirror {self._copy.storage.text} lacks {n_missing} trials{reason}; they are safe in the run, "
                f"and the same command adds them, as does `secateur dashboard`"
            )

    # --- as an observer of a search ---

    def on_start(self, n_known: int, budget: Budget) -> None:
        self._work.set()

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        self._report()
        self._work.set()

    def on_end(self, outcome: Outcome) -> None:
        self._report()

    def _report(self) -> None:
        while self._unsaid:
            self._say(self._unsaid.popleft())

    # --- the thread ---

    def _follow(self) -> None:
        """Copy new trials until the search has ended."""
        pause, name = 0.0, f"the mirror {self._copy.storage.text}"
        while not self._abandoned.is_set():
            self._work.wait()
            self._ending.wait(pause)
            self._work.clear()
            last = self._ending.is_set()
            try:
                self._copy.catch_up(self._abandoned.is_set)
            except Exception as error:  # noqa: BLE001  # drivers raise what they like; no mirror ends a search
                self._close()  # the next try reads anew which trials have arrived
                reason = self._copy.storage.reason(error)
                if self._trouble:
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                else:
                    pause = self._first_pause
                    self._unsaid.append(f"{name} lags: {reason}; the search goes on, and it will catch up")
                self._trouble = reason
                self._work.set()
            else:
                pause = GATHER_S
                if self._trouble and not self._abandoned.is_set():
                    self._unsaid.append(f"{name} has caught up")
                    self._trouble = ""
            if last:
                break
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # of a connection that is dead already
            self._copy.close()
