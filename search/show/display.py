"""Progress of a command on stderr: live on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Trial
from secateur.search.executor import Executor, WorkerStatus
from secateur.search.loop.loop import Outcome
from secateur.search.loop.notes import notes_line
from secateur.search.settings.settings import Settings
from secateur.search.show.tally import ENDINGS, Tally
from secateur.search.show.values import shown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

SECONDS_BETWEEN_LINES = 5.0
LINE = 110


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
        staff = None if self._executor is None else self._executor.worker_status
        if staff is None or staff == WorkerStatus(1, staff.busy):  # the one worker that is here
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
            self.note(f"search ended ({ENDINGS[outcome.reason]}): {counts}")


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
    """The best loss of each target so far, beside that of the baseline that it is compared with."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=True, show_edge=False)
    for heading in ("sparsity", "best loss", "beside", "ratio"):
        table.add_column(heading, justify="right")
    for label, pair in tally.best.items():
        best, beside = pair["loss"], pair["reference_loss"]
        ratio = f"{best / beside:.2f}x" if beside > 0 else ""
        table.add_row(label, shown("loss", best), f"{pair['reference']} {shown('loss', beside)}", ratio)
    return table
