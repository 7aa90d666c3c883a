"""How a command is told which trial of a run is meant: by its number, or by bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.search.cli.option_groups import with_group
from secateur.search.errors import UsageError
from secateur.search.results.pick import BOUND_KINDS, parse_bounds

if TYPE_CHECKING:
    from secateur.search.controller import Trial
    from secateur.search.results.run import Run

Bounds = Mapping[str, str | None]


def with_bounds(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of `BOUND_KINDS`; their texts come by name in its argument ``bounds``."""
    return with_group("bounds", {name: (_option(name), None) for name in BOUND_KINDS})(command)


def _option(name: str) -> Any:
    kind = BOUND_KINDS[name]
    text = f"At least, e.g. {kind.example}." if kind.at_least else f"E.g. {kind.example}, or 0.7x of dense."
    return Annotated[str | None, typer.Option(f"--{name}", help=text)]


def choose(run: Run, number: int | None, bounds: Bounds) -> Trial:
    """The trial with this number, or the best one within the bounds.

    Raises:
        UsageError: if neither or both are given, or there is no such trial.
    """
    if number is None:
        return run.pick(parse_bounds(bounds))
    if any(text is not None for text in bounds.values()):
        raise UsageError("Expected a trial's number or bounds, got both. Leave one out.")
    return run.pick(number=number)
