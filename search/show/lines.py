"""Lines of text about a search, for scripts that run several in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Trial
from secateur.search.executor import Executor
from secateur.search.loop.loop import Observer, Outcome
from secateur.search.settings.settings import Settings
from secateur.search.show.console import show_line
from secateur.search.show.progress import Progress
from secateur.search.show.summary import status_line
from secateur.search.study.study import trials_of

if TYPE_CHECKING:
    from secateur.search.loop.loop import Search


class Lines(Observer):
    """A line for each stage of a search, and one for each round that measured on data; an observer.

    Its methods fit a search: ``app.search(settings, run, observers=[lines], say=lines.say, on_ready=lines.on_ready)``.

    Args:
        name: of the search, before each line.
        clock: seconds of work of this process.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        write: Callable[[str], None] = show_line,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._name = name
        self._settings = settings
        self._write = write
        self._clock = clock
        self._began = clock()
        self._progress = Progress(settings, {})

    def say(self, line: str) -> None:
        """Name the stage that begins."""
        self._write(f"{self._name}: {line}")

    def on_ready(self, search: Search, executor: Executor) -> None:
        """Take the names of the baselines; called before the search starts."""
        self._progress = Progress(self._settings, search.baselines)

    def on_start(self, n_known: int, budget: Budget) -> None:
        self._progress.start(n_known)
        self.say(f"{n_known:,} measurements known")

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        self._progress.add(trials)
        if len(trials_of(trials, "proxy")) < len(trials):
            self.say(f"{self._status()}; {self._clock() - self._began:.0f} CPU s")

    def on_end(self, outcome: Outcome) -> None:
        self.say(f"ended ({outcome.why}): {self._status()}")

    def _status(self) -> str:
        progress = self._progress
        return status_line({**progress.facts(), "known": progress.n_known, "notes": {}})
