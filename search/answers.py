"""What several commands print."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secateur.search.console import complain, show, show_json
from secateur.search.errors import UsageError

if TYPE_CHECKING:
    from secateur.search.display import Display
    from secateur.search.run import Run
    from secateur.search.settings import Settings

PIPE_WIDTH = 160  # columns of a table that goes into a file or a pipe


def show_front(run: Run, json: bool, more: Mapping[str, Any] | None = None) -> None:
    """Print the front, and draw it into the run's directory if that can be written.

    Args:
        run: with at least one trial to compare.
        json: print a document; else a table.
        more: further keys of the document.
    """
    from rich.console import Console

    from secateur.search.plots import plot_front
    from secateur.search.tables import as_table, front_json, front_rows

    rows = front_rows(run)
    if not rows:
        raise UsageError(
            f"Expected a run with trials to compare, got {run.study.directory} without. Let it search on."
        )
    picture = run.study.directory / "report" / "front.png"
    try:
        plot_front(picture, run.trials(), run.front(), run.baselines, run.objectives)
    except OSError as error:  # e.g. somebody else's run
        complain(f"{picture} was not written: {error.strerror}.", "warning")
    if json:
        show_json({**(more or {}), **front_json(run, rows), "picture": str(picture)})
        return
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width, highlight=False).print(as_table(run, rows))
    show(f"picture: {picture}")


def show_facts(facts: Mapping[str, str]) -> None:
    """Names and values, one pair a line."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        show(f"  {name.ljust(width)}  {value}")


def one_line(values: Mapping[str, float]) -> str:
    """Values, and the perplexity that follows from them."""
    from secateur.search.tables import perplexity, shown

    found = {**values, "perplexity": perplexity(values)}
    names = {"perplexity": "ppl"}
    return ", ".join(
        f"{n} {shown(names.get(n, n), value)}" for n, value in found.items() if value is not None
    )


def open_display(settings: Settings | None = None) -> Display:
    """Progress on stderr."""
    from rich.console import Console

    from secateur.search.display import Display

    return Display(Console(stderr=True, highlight=False), settings)
