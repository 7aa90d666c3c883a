"""Progress of a command on stderr: live on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Column

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Trial
from secateur.search.executor import Executor, WorkerStatus
from secateur.search.loop.loop import Observer, Outcome
from secateur.search.settings.settings import Settings
from secateur.search.show.progress import Progress
from secateur.search.show.summary import as_table, status_line, status_lines

SECONDS_BETWEEN_LINES = 5.0


class Display(Observer):
    """Stages of a command and progress of a search; an observer, and a context manager.

    Args:
        console: of stderr.
        settings: of the search; None for a command without one.
    """

    def __init__(self, console: Console, settings: Settings | None = None) -> None:
        self._console = console
        self._settings = settings
        self._progress: Progress | None = None
        self._executor: Executor | None = None
        self._notes: Callable[[], Mapping[str, float]] = dict
        self._last_kind = ""  # of the last plain line
        self._last_time = -SECONDS_BETWEEN_LINES
        self._bar = _Bar(console) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def watch(
        self,
        baselines: Mapping[str, str],
        executor: Executor,
        notes: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Follow a search that is about to start.

        Args:
            baselines: canonical texts of its baselines by name.
            executor: whose workers are shown, too.
            notes: of its controller, at any moment.
        """
        self._executor, self._notes = executor, notes
        if self._settings is not None:
            self._progress = Progress(self._settings, baselines)

    def say(self, line: str) -> None:
        """Name the stage that begins. Of the steps of one stage, such as 3/30, few are shown as plain lines."""
        self._plain(line, kind=re.sub(r"\d+", "", line))
        if self._bar is not None:
            self._bar.say(line)

    def note(self, line: str) -> None:
        """Print a permanent line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _plain(self, line: str, kind: str) -> None:
        """Print a line where there is no terminal, unless one of its kind was printed just now."""
        now = time.monotonic()
        if self._bar is None and (kind != self._last_kind or now - self._last_time >= SECONDS_BETWEEN_LINES):
            self._last_kind, self._last_time = kind, now
            self.note(line)

    def _facts(self, progress: Progress) -> dict[str, Any]:
        more = {"known": progress.n_known, "notes": self._notes()}
        return {**progress.facts(), **progress.pace(), **more}

    def _workers(self) -> list[str]:
        """State of the workers: a line, and one for each of the last troubles."""
        status = None if self._executor is None else self._executor.worker_status
        if status is None or status == WorkerStatus(1, status.busy):  # the one worker in this process
            return []
        lost = f", {status.lost} lost and replaced" if status.lost else ""
        return [f"{status.busy} of {status.workers} workers busy{lost}", *status.troubles]

    # --- as an observer of a search ---

    def on_start(self, n_known: int, budget: Budget) -> None:
        if self._progress is not None:
            self._progress.start(n_known)
        self.say("measuring the baselines")

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        if self._progress is None:
            return
        self._progress.add(trials)
        facts, workers = self._facts(self._progress), self._workers()
        self._plain("; ".join([f"searching: {status_line(facts)}", *workers[:1]]), kind="searching")
        if self._bar is not None:
            lines = status_lines(facts) | ({"workers": "\n".join(workers)} if workers else {})
            self._bar.say("searching")
            self._bar.show(facts["used"], as_table(lines))

    def on_end(self, outcome: Outcome) -> None:
        if self._progress is not None:
            facts = self._facts(self._progress) | {"seconds_left": None}
            self.note(f"search ended ({outcome.why}): {status_line(facts)}")
        if self._bar is not None:
            self._bar.show(None, "")


class _Bar(ProgressBar):
    """A row for the stage, with a bar where its end is known, and whatever belongs below it."""

    def __init__(self, console: Console) -> None:
        self._below: RenderableType = ""
        description = TextColumn("{task.description}", markup=False, table_column=Column())  # may be wrapped
        columns = SpinnerColumn(), description, BarColumn(32), TextColumn("{task.fields[used]}")
        super().__init__(*columns, console=console, refresh_per_second=8, transient=True)
        self._stage = self.add_task("starting", total=None, used="")

    def get_renderables(self) -> Any:
        """Rows of the tasks, then what is below."""
        yield from super().get_renderables()
        yield self._below

    def say(self, stage: str) -> None:
        self.update(self._stage, description=stage)

    def show(self, share: float | None, below: RenderableType) -> None:
        """Show the share of the stage that is done, in [0, 1], None: not known; and what belongs below."""
        self.tasks[0].total, self._below = None if share is None else 1.0, below
        self.update(self._stage, completed=share or 0.0, used="" if share is None else f"{share:.0%}")
