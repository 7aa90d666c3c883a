"""Looking on from another terminal or machine: reads the files of a run as they grow, and writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.results.run import Run, open_run
from secateur.search.show.console import show_line
from secateur.search.show.progress import Progress
from secateur.search.show.summary import status_line, status_lines, summary
from secateur.search.study.about import ABOUT
from secateur.search.study.lock import writer_of
from secateur.search.study.study import MEASUREMENTS, SETTINGS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Facts = Mapping[str, Any]


class Watch:
    """Facts about a run, read anew at each `update`: of its measurements only what was appended.

    The run is opened again when it is continued with other settings.

    Args:
        directory: of the run, here or on a shared file system.
        clock: seconds, monotonic.

    Raises:
        UsageError: if the directory holds no study.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._open()

    def _open(self) -> None:
        self._stamp = self._stamps()
        self._run: Run = open_run(self._directory)
        self._progress = Progress(self._run.settings, self._run.study.about.baselines)
        self._progress.add(self._run.study.trials)
        self._began, self._n_first = self._clock(), self._progress.spent.evaluations

    def update(self) -> dict[str, Any]:
        """See `summary`; with the pace since the watch began, None as long as nothing was measured."""
        if self._stamps() != self._stamp:
            self._open()
        else:
            self._progress.add(self._run.study.refresh())
        elapsed = self._clock() - self._began
        n_new = self._progress.spent.evaluations - self._n_first
        pace = 3600 * n_new / elapsed if n_new and elapsed > 0 else None
        return {**summary(self._run, self._progress), "evaluations_per_hour": pace}

    def _stamps(self) -> list[object]:
        """Change when what is not appended to changes."""
        found: list[object] = []
        for name in (ABOUT, SETTINGS, MEASUREMENTS):
            path = self._directory / name
            stat = path.stat() if path.exists() else None
            found.append(stat and (stat.st_ino if name == MEASUREMENTS else (stat.st_mtime_ns, stat.st_size)))
        return found


def watch(directory: Path, show_facts: Callable[[Facts], None], every: float) -> None:
    """Show the run until nobody writes it any more, or until a KeyboardInterrupt, which it lets through.

    Args:
        directory: of the run.
        show_facts: called at once, and every so many seconds; the last time with all that was measured.
        every: seconds.

    Raises:
        UsageError: if the directory holds no study.
    """
    of = Watch(directory)
    while True:
        alive = (
            writer_of(directory) is not None
        )  # asked before the update, so that the last one shows everything
        show_facts(of.update())
        if not alive:
            return
        time.sleep(every)


def line_printer(write: Callable[[str], None] = show_line) -> Callable[[Facts], None]:
    """Shows a line whenever there is news: for a pipe or a file."""
    last = ""

    def show_news(facts: Facts) -> None:
        nonlocal last
        line = status_line({**facts, "evaluations_per_hour": None})
        if line != last:
            write(status_line(facts))
            last = line

    return show_news


def as_table(facts: Facts) -> Table:
    """The facts for a terminal that is painted again and again."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, line in status_lines(facts).items():
        table.add_row(Text(name, "dim"), Text(line))  # as they are, not as markup
    return table


def watch_here(directory: Path, console: Console, every: float) -> None:
    """Show the run on the console until nobody writes it any more: painted on a terminal, else in lines."""
    from rich.live import Live

    if not console.is_terminal:
        watch(directory, line_printer(), every)
        return
    with Live(console=console, auto_refresh=False) as live:
        watch(directory, lambda facts: live.update(as_table(facts), refresh=True), every)
