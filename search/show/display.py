"""Progress of a command on stderr: live on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from secateur.search.controller import Trial
from secateur.search.executor import Executor, Staff
from secateur.search.loop import Outcome
from secateur.search.notes import notes_line
from secateur.search.settings import Budget, Settings
from secateur.search.show.progress import Progress
from secateur.search.show.reasons import grouped
from secateur.search.show.tables import shown
from secateur.search.study import Spent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

SECONDS_BETWEEN_LINES = 5.0
N_REASONS, LINE = 3, 110


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
    def best(self) -> dict[str, dict[str, float]]:
        """The best loss of each budget so far, with the uniform one: ``{"0.6": {"loss": ..., "uniform": ...}}``."""
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


class Display:
    """Shows the stages of a command and the progress of a search; an observer, and a context manager.

    Args:
        console: of stderr.
        settings: of the search; None for a command without one.
    """

    def __init__(self, console: Console, settings: Settings | None = None) -> None:
        self._console = console
        self._settings = settings
        self._tally: Tally | None = None
        self._stage = "starting"
        self._searching = False
        self._executor: Executor | None = None
        self._notes: Callable[[], Mapping[str, float]] = dict
        self._said = ""  # kind of the last plain line
        self._said_at = -SECONDS_BETWEEN_LINES
        self._live = _live(console) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
            self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(
        self,
        baselines: Mapping[str, str],
        executor: Executor,
        notes: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """A search is about to start.

        Args:
            baselines: canonical texts of its baselines by name.
            executor: whose workers are shown, too.
            notes: of its controller, at any moment.
        """
        self._executor, self._notes = executor, notes
        if self._settings is not None:
            self._tally = Tally(self._settings, baselines)

    def say(self, line: str) -> None:
        """Name the stage that begins. Steps of one stage, such as 3/30, are not all shown as plain lines."""
        self._stage = line
        self._plain(line, kind=re.sub(r"\d+", "", line))
        self._refresh()

    def note(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _plain(self, line: str, kind: str) -> None:
        """A line where there is no terminal, unless one of its kind was shown just now."""
        now = time.monotonic()
        if self._live is None and (kind != self._said or now - self._said_at >= SECONDS_BETWEEN_LINES):
            self._said, self._said_at = kind, now
            self.note(line)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._frame())

    def _frame(self) -> RenderableType:
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.text import Text

        stage = Spinner("dots", Text(self._stage))
        if self._tally is None or not self._searching:
            return stage
        parts = (self._tally.work, notes_line(self._notes()), *self._tally.failures, *self._staff())
        lines = [f"  {line[:LINE]}" for line in parts if line]
        return Group(stage, _bar(self._tally), Text("\n".join(lines), "dim"), _best(self._tally))

    def _staff(self) -> list[str]:
        """How the workers are: a line, and one for each of the last troubles."""
        staff = None if self._executor is None else self._executor.staff
        if staff is None or staff == Staff(1, staff.busy):  # the one worker that is here
            return []
        lost = f", {staff.lost} lost and replaced" if staff.lost else ""
        return [f"{staff.busy} of {staff.workers} workers busy{lost}", *staff.troubles]

    # --- as an observer of a search ---

    def on_start(self, n_known: int, budget: Budget) -> None:
        self._searching = True
        if self._tally is not None:
            self._tally.start(n_known, budget)
        self.say("measuring the baselines")

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        tally = self._tally
        if tally is None:
            return
        tally.add(trials, spent)
        self._stage = "searching"
        best = ", ".join(f"{shown('loss', pair['loss'])} at {label}" for label, pair in tally.best.items())
        parts = [
            f"searching: {tally.done:.0%}",
            tally.counts,
            tally.work,
            notes_line(self._notes()),
            f"best {best}" if best else "",
            *self._staff()[:1],
            tally.left,
        ]
        self._plain("; ".join(part for part in parts if part), kind="searching")
        self._refresh()

    def on_end(self, outcome: Outcome) -> None:
        self._searching = False
        tally = self._tally
        if tally is not None:
            counts = "; ".join(part for part in (tally.counts, tally.work) if part)
            self.note(f"search ended ({_REASONS[outcome.reason]}): {counts}")


_REASONS = {
    "budget": "its budget is used up",
    "finished": "the controller has finished",
    "exhausted": "nothing new is left to propose",
    "stopped": "stopped",
}


def _live(console: Console) -> Live:
    from rich.live import Live

    return Live(console=console, refresh_per_second=8, transient=True)


def _bar(tally: Tally) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    row = Table.grid(padding=(0, 1))
    row.add_row(
        " ",
        ProgressBar(total=1.0, completed=tally.done, width=32),
        f"{tally.done:4.0%}",
        tally.counts,
        tally.left,
    )
    return row


def _best(tally: Tally) -> Table:
    """The best loss of each budget so far, beside the uniform one."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=True, show_edge=False)
    for heading in ("sparsity", "best loss", "uniform", "ratio"):
        table.add_column(heading, justify="right")
    for label, pair in tally.best.items():
        best, uniform = pair["loss"], pair["uniform"]
        ratio = f"{best / uniform:.2f}x" if uniform > 0 else ""
        table.add_row(label, shown("loss", best), shown("loss", uniform), ratio)
    return table


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
