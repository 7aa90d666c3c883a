"""Watching a run from another terminal or machine: reads its files as they grow, and writes nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.results.run import Run, open_run
from secateur.search.show.console import show_line
from secateur.search.show.progress import PACE, Progress
from secateur.search.show.summary import Facts, as_table, status_line, status_lines, summary
from secateur.search.study.about import ABOUT
from secateur.search.study.lock import writer_of
from secateur.search.study.state import LOG, read_state
from secateur.search.study.study import MEASUREMENTS, SETTINGS

if TYPE_CHECKING:
    from rich.console import Console


class Watch:
    """Facts about a run, updated from what was appended to its measurements.

    A run that is continued with other settings is opened again.

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
        study = self._run.study
        self._progress = Progress(self._run.settings, study.about.baselines, self._clock)
        self._progress.add(study.trials)
        self._progress.start(len(study.trials))

    def update(self) -> dict[str, Any]:
        """Read what is new; `summary`, and the pace since the watch began."""
        if self._stamps() != self._stamp:
            self._open()
        else:
            self._progress.add(self._run.study.refresh())
            self._run.check()
        return {**summary(self._run, self._progress), **self._progress.pace()}

    def _stamps(self) -> list[object]:
        """Identity of the files that are replaced as a whole, and of the file that grows."""
        found: list[object] = []
        for name in (ABOUT, SETTINGS, MEASUREMENTS):
            path = self._directory / name
            stat = path.stat() if path.exists() else None
            found.append(stat and (stat.st_ino if name == MEASUREMENTS else (stat.st_mtime_ns, stat.st_size)))
        return found


def preparing(directory: Path) -> str:
    """Progress of a run that has no study yet: the last line of its log."""
    with contextlib.suppress(OSError):
        lines = (directory / LOG).read_text(encoding="utf-8").splitlines()
        return f"preparing: {lines[-1].partition(' ')[2]}" if lines else "preparing"
    return "preparing"


def watch(
    directory: Path,
    show_facts: Callable[[Facts], None],
    every: float,
    show_preparing: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Show a run until no process writes it any more; one that is being prepared is waited for.

    A KeyboardInterrupt is passed on.

    Args:
        show_preparing: called with the directory now and then, while there is no study yet.
        show_facts: called at once and after each pause, the last time with all measurements.
        every: seconds of a pause.

    Raises:
        UsageError: if the directory holds no study.
    """
    while (
        (state := read_state(directory)) and state.state == "preparing" and not (directory / ABOUT).is_file()
    ):
        show_preparing(directory)
        time.sleep(every)
    of = Watch(directory)
    while True:
        alive = writer_of(directory) is not None  # before the update, so that the last one is complete
        show_facts(of.update())
        if not alive:
            return
        time.sleep(every)


def line_printer(write: Callable[[str], None] = show_line) -> Callable[[Facts], None]:
    """Printer of a line whenever there is news, for a pipe or a file."""
    last = ""

    def show_news(facts: Facts) -> None:
        nonlocal last
        line = status_line({**facts, **dict.fromkeys(PACE)})
        if line != last:
            write(status_line(facts))
            last = line

    return show_news


def watch_here(directory: Path, console: Console, every: float) -> None:
    """Show a run on the console until no process writes it any more: live on a terminal, else in lines."""
    from rich.live import Live

    if not console.is_terminal:
        watch(directory, line_printer(), every, lambda directory: show_line(preparing(directory)))
        return
    with Live(console=console, auto_refresh=False) as live:
        watch(
            directory,
            lambda facts: live.update(as_table(status_lines(facts)), refresh=True),
            every,
            lambda directory: live.update(preparing(directory), refresh=True),
        )
