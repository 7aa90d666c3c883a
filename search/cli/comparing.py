"""Command for several runs: ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.search.cli.option_groups import Json
from secateur.search.errors import UsageError
from secateur.search.show.console import show_json
from secateur.search.show.grid import FORMS

if TYPE_CHECKING:
    from secateur.search.results.run import Run


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.")],
    form: Annotated[str, typer.Option(help=f"{', '.join(FORMS[:-1])} or {FORMS[-1]}.")] = "table",
    front: Annotated[
        bool, typer.Option("--front", help="The front of all runs together, by the values on the test text.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare runs on the test text: mean and spread over seeds, and paired differences to the first."""
    from secateur.search.results.run import open_run

    if form not in FORMS:
        raise UsageError(f"Expected `--form` {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {form!r}.")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("Expected each run once, got one twice.")
    show_compared([open_run(run) for run in runs], form=form, front=front, json=json)


def show_compared(runs: Sequence[Run], *, form: str = "table", front: bool = False, json: bool) -> None:
    """Print the comparison of runs, or their merged front.

    Raises:
        UsageError: as `compared` and `merged_front` do.
    """
    from secateur.search.results.compare import compared, merged_front
    from secateur.search.show.compared import compared_grid, compared_json, merged_grid, merged_json
    from secateur.search.show.front_table import PIPE_WIDTH

    if front:
        found = merged_front(runs)
        show_json(merged_json(found)) if json else merged_grid(runs, found).show(form, PIPE_WIDTH)
        return
    rows = compared(runs)
    show_json(compared_json(rows)) if json else compared_grid(rows).show(form, PIPE_WIDTH)
