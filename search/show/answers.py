"""What several commands print."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.errors import UsageError
from secateur.search.show.console import complain, show, show_json, show_line

if TYPE_CHECKING:
    from secateur.search.recovery.stage import Recovered
    from secateur.search.results.run import Run
    from secateur.search.settings.settings import Settings
    from secateur.search.show.display import Display

PIPE_WIDTH = 160  # columns of a table that goes into a file or a pipe


def show_front(run: Run, json: bool, more: Mapping[str, Any] | None = None) -> None:
    """Print the front, and draw it into the run's directory if that can be written.

    Args:
        run: with at least one trial to compare.
        json: print a document; else a table.
        more: further keys of the document.
    """
    from rich.console import Console

    from secateur.search.show.front_plot import plot_front
    from secateur.search.show.tables import as_table, front_json, front_rows

    rows = front_rows(run)
    if not rows:
        raise UsageError(
            f"Expected a run with trials to compare, got {run.study.directory} without. Let it search on."
        )
    picture = run.study.directory / "report" / "front.png"
    try:
        plot_front(picture, run)
    except OSError as error:  # e.g. somebody else's run
        complain(f"{picture} was not written: {error.strerror}.", "warning")
    if json:
        show_json({**(more or {}), **front_json(run, rows), "picture": str(picture)})
        return
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width, highlight=False).print(as_table(run, rows))
    show(f"picture: {picture}")


def show_recovered(run: Run, results: Sequence[Recovered], json: bool) -> None:
    """What became of recovered trials, beside what they were before."""
    rows = []
    for found in results:
        trial = run.study.trials[found.trial]
        test = run.test_of(trial)
        rows.append(
            {
                "trial": found.trial,
                "model": None if found.directory is None else str(found.directory / "model"),
                "test": None if test is None else dict(test.values),
                "recovered": None if found.measurement is None else dict(found.measurement.values),
                "note": found.note,
            }
        )
        if not json and found.measurement is not None:
            show(f"trial {found.trial} {found.note or 'recovered'}: {rows[-1]['model']}")
            names = ("loss", "ce")
            facts = {} if test is None else {"test, as searched": one_line(_only(test.values, names))}
            show_facts(facts | {"test, as recovered": one_line(_only(found.measurement.values, names))})
        elif not json:
            show(f"trial {found.trial}: {found.note}")
    if json:
        show_json({"run": str(run.study.directory), "recovered": rows})


def _only(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: values[name] for name in names if name in values}


def show_facts(facts: Mapping[str, str]) -> None:
    """Names and values, one pair a line."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        show(f"  {name.ljust(width)}  {value}")


def watch_status(run: Path, every: float, json: bool) -> None:
    """Print how far a search is, again and again, until nobody writes it any more or Ctrl-C."""
    from rich.console import Console

    from secateur.search.show.watch import watch, watch_here

    if not every > 0:
        raise UsageError(f"Expected `--every` > 0 seconds, got {every}.")
    try:
        if json:
            watch(run, lambda facts: show_line(dumps(facts)), every)
        else:
            watch_here(run, Console(highlight=False), every)
            complain(f"Nobody is writing {run} any more.", "note")
    except KeyboardInterrupt:
        complain("No longer watching; the search goes on.", "note")


def one_line(values: Mapping[str, float]) -> str:
    """Values, and the perplexity that follows from them."""
    from secateur.search.show.values import perplexity, shown

    found = {**values, "perplexity": perplexity(values)}
    names = {"perplexity": "ppl"}
    return ", ".join(
        f"{n} {shown(names.get(n, n), value)}" for n, value in found.items() if value is not None
    )


def open_display(settings: Settings | None = None) -> Display:
    """Progress on stderr."""
    from rich.console import Console

    from secateur.search.show.display import Display

    return Display(Console(stderr=True, highlight=False), settings)
