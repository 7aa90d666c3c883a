"""A search in lines of text: for scripts that run several in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Trial
from secateur.search.executor import Executor
from secateur.search.loop.loop import Outcome
from secateur.search.settings.settings import Settings
from secateur.search.show.console import show_line
from secateur.search.show.tally import ENDINGS, Tally
from secateur.search.show.values import shown
from secateur.search.study.study import trials_of

if TYPE_CHECKING:
    from secateur.search.loop.loop import Search


class Lines:
    """A line for each stage of a search, and one for each round in which something was measured on data.

    Its methods are what a search takes: ``app.search(settings, run, observers=[lines], say=lines.say,
    on_ready=lines.on_ready)``.

    Args:
        name: of the search, before each line.
        settings: of the search.
        write: told each line.
        clock: seconds that this process has worked.
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
        self._tally = Tally(settings, {})
        self._n_screened = 0

    def say(self, line: str) -> None:
        """Name the stage that begins."""
        self._write(f"{self._name}: {line}")

    def on_ready(self, search: Search, executor: Executor) -> None:
        """A search is about to start."""
        self._tally = Tally(self._settings, search.baselines)

    def on_start(self, n_known: int, budget: Budget) -> None:
        self._tally.start(n_known, budget)
        self.say(f"{n_known:,} measurements known")

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        self._tally.add(trials, spent)
        n_screened = len(trials_of(trials, "proxy"))
        self._n_screened += n_screened
        if n_screened < len(trials):
            self.say("; ".join(part for part in self._parts() if part))

    def on_end(self, outcome: Outcome) -> None:
        self.say(f"ended ({ENDINGS[outcome.reason]}): {self._tally.counts}; {self._tally.work}")

    def _parts(self) -> tuple[str, ...]:
        best = (f"{shown('loss', x['loss'])} at {label}" for label, x in self._tally.best.items())
        return (
            self._tally.counts,
            f"{self._n_screened:,} screened" if self._n_screened else "",
            f"best loss {', '.join(best)}" if self._tally.best else "",
            f"{self._clock() - self._began:.0f} CPU s",
        )
