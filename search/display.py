"""Progress of a command on stderr: live on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from secateur.search.controller import Trial
from secateur.search.course import UNIFORM, best_by_budget, budgets
from secateur.search.front import hypervolume_series, non_dominated
from secateur.search.loop import Outcome
from secateur.search.settings import Budget, Settings
from secateur.search.study import Spent
from secateur.search.tables import shown
from secateur.spaces.measurement import Fidelity

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

SECONDS_BETWEEN_LINES = 5.0


class Tally:
    """What there is to show about a search, folded from what an observer is told.

    Args:
        settings: of the search.
        clock: seconds, monotonic.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = settings.budget
        self.spent = Spent()
        self.n_known = 0
        self.best: dict[str, Trial] = {}  # by budget
        self.uniform: dict[str, Trial] = {}
        self.hypervolume: float | None = None
        self._objectives = settings.objectives
        self._fidelity = Fidelity("search", settings.evaluator.fidelities[-1])
        self._targets: tuple[float, ...] = getattr(settings.space, "targets", ())
        self._baselines: list[Trial] | None = None
        self._front: list[Trial] = []
        self._clock = clock
        self._began = clock()
        self._fresh = Spent()  # measured in this process

    def start(self, n_known: int, budget: Budget) -> None:
        self.n_known, self.budget, self._began = n_known, budget, self._clock()

    def add(self, trials: Sequence[Trial], spent: Spent) -> None:
        self.spent = spent
        self._fresh = self._fresh.plus(trial for trial in trials if trial.number >= self.n_known)
        shown_here = [
            t for t in trials if t.measurement.fidelity == self._fidelity and t.measurement.infeasible is None
        ]
        if self._baselines is None:  # they are the first round of every search
            self._take_baselines(shown_here)
        if not shown_here:
            return
        known = {label: t.measurement.values["sparsity"] for label, t in self.uniform.items()}
        self.best = best_by_budget([*self.best.values(), *shown_here], known)
        self._front = non_dominated([*self._front, *shown_here], self._objectives, self._fidelity)
        texts = {trial.measurement.candidate for trial in self._baselines or ()}
        together = {t.number: t for t in [*(self._baselines or ()), *self._front]}
        series = hypervolume_series(together.values(), self._objectives, texts, self._fidelity)
        self.hypervolume = series[-1][1] if series else None

    def _take_baselines(self, trials: Sequence[Trial]) -> None:
        """The first round: the dense model, then the uniform candidate of each target."""
        self._baselines = list(trials)
        names = ["dense", *(f"{UNIFORM}{target:.10g}" for target in self._targets)]
        named = dict(zip(names, trials, strict=False))
        self.uniform = {label: named[UNIFORM + label] for label in budgets(named)}

    @property
    def done(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        return min(1.0, _share(self.spent, self.budget))

    @property
    def tokens_per_second(self) -> float | None:
        """Evaluated in this process, by the clock on the wall."""
        elapsed = self._clock() - self._began
        return self._fresh.tokens / elapsed if self._fresh.tokens and elapsed > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Until the budget is used up, at the pace so far."""
        fresh = _share(self._fresh, self.budget)
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
        n_blocks = self.spent.blocks + self.spent.blocks_saved
        if n_blocks:
            parts.append(f"{self.spent.blocks:,} blocks ({self.spent.blocks_saved / n_blocks:.0%} saved)")
        if self.hypervolume is not None:
            parts.append(f"hypervolume {self.hypervolume:.3f}")
        return ", ".join(parts)

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
        self._tally = None if settings is None else Tally(settings)
        self._stage = "starting"
        self._searching = False
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
        return Group(stage, _bar(self._tally), Text(f"  {self._tally.work}", "dim"), _best(self._tally))

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
        best = ", ".join(
            f"{shown('loss', t.measurement.values['loss'])} at {n}" for n, t in tally.best.items()
        )
        parts = [
            f"searching: {tally.done:.0%}",
            tally.counts,
            tally.work,
            f"best {best}" if best else "",
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
    for label, trial in tally.best.items():
        best, uniform = (t.measurement.values["loss"] for t in (trial, tally.uniform[label]))
        ratio = f"{best / uniform:.2f}x" if uniform > 0 else ""
        table.add_row(label, shown("loss", best), shown("loss", uniform), ratio)
    return table


def _share(spent: Spent, budget: Budget) -> float:
    """The largest share of a limit that was spent."""
    pairs = [
        (spent.evaluations, budget.evaluations),
        (spent.tokens, budget.tokens),
        (spent.seconds / 60, budget.minutes),
    ]
    return max((used / limit for used, limit in pairs if limit is not None), default=0.0)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
