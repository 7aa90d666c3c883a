"""Choice of one trial of a run on the command line: by its number, or by bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.search.cli.option_groups import with_group
from secateur.search.errors import UsageError
from secateur.search.objectives import objective
from secateur.search.results.pick import BOUND_KINDS, parse_bounds

if TYPE_CHECKING:
    from secateur.search.controller import Trial
    from secateur.search.results.run import Run

Bounds = Mapping[str, str | None]


def with_bounds(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: an option for each of `BOUND_KINDS`; their texts by name are the command's argument ``bounds``."""
    return with_group("bounds", {name: (_option(name), None) for name in BOUND_KINDS})(command)


def _option(name: str) -> Any:
    kind = BOUND_KINDS[name]
    side, relative = ("Lower", "") if kind.at_least else ("Upper", ", or 0.7x of the dense model's")
    text = f"{side} limit on {objective(kind.value).label}, e.g. {kind.example}{relative}."
    return Annotated[str | None, typer.Option(f"--{name}", help=text)]


def choose(run: Run, number: int | None, bounds: Bounds) -> Trial:
    """The trial with this number, or the best one within the bounds.

    Raises:
        UsageError: if neither or both are given, or no trial fits.
    """
    if number is None:
        return run.pick(parse_bounds(bounds))
    if any(text is not None for text in bounds.values()):
        raise UsageError("Expected a trial's number or bounds, got both. Leave one out.")
    return run.pick(number=number)
