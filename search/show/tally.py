"""What there is to show about a search while it runs: its pace, its work, what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Trial
from secateur.search.loop.ledger import Reason
from secateur.search.settings.settings import Settings
from secateur.search.show.progress import Progress
from secateur.search.show.reasons import grouped
from secateur.search.show.values import duration

N_REASONS = 3
ENDINGS: dict[Reason, str] = {
    "budget": "its budget is used up",
    "finished": "the controller has finished",
    "exhausted": "nothing new is left to propose",
    "stopped": "stopped",
}
"""Why a search ended, for people."""


class Tally:
    """What there is to show about a search, folded from what an observer is told.

    Args:
        settings: of the search.
        baselines: canonical texts of the baselines by name.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        settings: Settings,
        baselines: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = settings.budget
        self.spent = Spent()
        self.n_known = 0
        self._progress = Progress(settings, baselines)
        self._clock = clock
        self._began = clock()
        self._fresh = Spent()  # measured in this process

    def start(self, n_known: int, budget: Budget) -> None:
        self.n_known, self.budget, self._began = n_known, budget, self._clock()

    def add(self, trials: Sequence[Trial], spent: Spent) -> None:
        self.spent = spent
        self._fresh = self._fresh.plus(trial for trial in trials if trial.number >= self.n_known)
        self._progress.add(trials)

    @property
    def best(self) -> dict[str, dict[str, Any]]:
        """The best loss of each target so far, see `Progress.best`."""
        return self._progress.best()

    @property
    def hypervolume(self) -> float | None:
        """Of the front so far."""
        return self._progress.hypervolume()

    @property
    def done(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        return min(1.0, self.budget.share(self.spent))

    @property
    def tokens_per_second(self) -> float | None:
        """Evaluated in this process, by the clock on the wall."""
        elapsed = self._clock() - self._began
        return self._fresh.tokens / elapsed if self._fresh.tokens and elapsed > 0 else None

    @property
    def evaluations_per_hour(self) -> float:
        """Measured in this process, by the clock on the wall."""
        return 3600 * self._fresh.evaluations / max(self._clock() - self._began, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Until the budget is used up, at the pace so far."""
        fresh = self.budget.share(self._fresh)
        return (self._clock() - self._began) * (1 - self.done) / fresh if fresh > 0 else None

    @property
    def counts(self) -> str:
        """Evaluations and tokens of the budget."""
        of = self.budget
        evaluations = f"{self.spent.evaluations:,}" + (f"/{of.evaluations:,}" if of.evaluations else "")
        tokens = f"{self.spent.tokens:,}" + (f"/{of.tokens:,}" if of.tokens else "")
        known = f" ({self.n_known:,} from before)" if self.n_known else ""
        return f"{evaluations} evaluations{known}, {tokens} tokens"

    @property
    def work(self) -> str:
        """Speed, blocks, hypervolume."""
        parts = []
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
            parts.append(f"{self.evaluations_per_hour:,.0f} evaluations/h")
        n_blocks = self.spent.blocks + self.spent.blocks_saved
        if n_blocks:
            parts.append(f"{self.spent.blocks:,} blocks ({self.spent.blocks_saved / n_blocks:.0%} saved)")
        if self._progress.n_front:
            parts.append(f"front of {self._progress.n_front}")
        if self.hypervolume is not None:
            parts.append(f"hypervolume {self.hypervolume:.3f}")
        return ", ".join(parts)

    @property
    def failures(self) -> list[str]:
        """The most frequent reasons why candidates were infeasible, a line each."""
        return [f"{n} infeasible: {reason}" for reason, n in grouped(self._progress.infeasible)[:N_REASONS]]

    @property
    def left(self) -> str:
        """Time left, for people."""
        return "" if self.seconds_left is None else f"about {duration(self.seconds_left)} left"
