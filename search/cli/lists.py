"""Command ``list``: names for settings and commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from secateur.search.cli.option_groups import Json, completing
from secateur.search.errors import UsageError
from secateur.search.show.console import complain, show, show_json
from secateur.spaces.measurement import MARGIN
from secateur.spaces.names import nearest
from secateur.spaces.plugins import left_out, resolve

Rows = list[dict[str, str]]


def list_(
    what: Annotated[
        str,
        typer.Argument(help=f"One of: {', '.join(LISTS)}.", autocompletion=completing(lambda: LISTS)),
    ],
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table in Markdown.")] = False,
) -> None:
    """List the names that settings and commands accept."""
    if what not in LISTS:
        raise UsageError(f"Expected something to list, got {what!r}.{nearest(what, LISTS)}")
    rows = LISTS[what]()
    if json:
        show_json(rows)
    else:
        for line in as_markdown(rows) if markdown else as_lines(rows):
            show(line)
    for line in left_out():
        complain(line, "warning")


def as_lines(rows: Rows) -> list[str]:
    """The rows as text, in columns; the last two, summary and source, are not padded."""
    *padded, summary, source = rows[0]
    widths = {key: max(len(row[key]) for row in rows) for key in padded}
    parts = ([*(row[key].ljust(widths[key]) for key in padded), row[summary], row[source]] for row in rows)
    return ["  ".join(part for part in line if part).rstrip() for line in parts]


def as_markdown(rows: Rows) -> list[str]:
    """The rows as a table in Markdown, without empty columns."""
    keys = [key for key in rows[0] if any(row[key] for row in rows)]
    cells = [keys, ["---"] * len(keys), *([row[key].replace("|", "\\|") for key in keys] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def _row(name: str, summary: str, source: str = "", origin: str = "") -> dict[str, str]:
    """One line of a list; `source` is a paper's address, `origin` the package that adds the row, if another."""
    return {"name": name, "origin": origin, "summary": summary, "source": source}


def _registered(path: str) -> Rows:
    """The rows of the registry at a path, imported now."""
    return [_row(name, x.summary, x.source, x.origin) for name, x in resolve(path).items()]


def _evaluators() -> Rows:
    from secateur.search.losses import LOSSES, loss_of

    rows = {**LOSSES, f"{MARGIN}<task>": loss_of(f"{MARGIN}<task>")}
    return [
        _row(name, f"{x.summary}, {x.unit}" if x.unit else x.summary, x.paper) for name, x in rows.items()
    ]


def _methods() -> Rows:
    from secateur.search.app.methods import method_rows

    return method_rows()


def _metrics() -> Rows:
    from secateur.spaces.formulas.operators import OPERATORS, TERMINALS
    from secateur.spaces.methods import METRICS, RECONSTRUCTIONS

    rows = [*METRICS.values(), *RECONSTRUCTIONS.values()]
    signs = [operator.infix or name for name, operator in OPERATORS.items()]
    formulas = f"such as abs(W) * X; of {' '.join(TERMINALS)}, numbers, {' '.join(signs)}"
    return [*(_row(x.name, x.summary, x.paper, x.origin) for x in rows), _row("formula: ...", formulas)]


def _recipes() -> Rows:
    from secateur.spaces.recipe.known import KNOWN

    return [{"name": n, "unit": x.unit, "summary": x.summary, "source": x.paper} for n, x in KNOWN.items()]


def _families() -> Rows:
    from secateur.pruners.models.families import FAMILIES

    return [_row(name, "tested; others that are built alike work too") for name in FAMILIES]


def _formats() -> Rows:
    from secateur.pruners.export.registry import FORMATS

    families = {name: ", ".join(x.families) if x.families else "all families" for name, x in FORMATS.items()}
    return [_row(name, f"{x.summary} ({families[name]})", x.source, x.origin) for name, x in FORMATS.items()]


LISTS: dict[str, Callable[[], Rows]] = {
    "spaces": lambda: _registered("secateur.spaces.registry:SPACES"),
    "controllers": lambda: _registered("secateur.search.controllers.registry:CONTROLLERS"),
    "evaluators": _evaluators,
    "methods": _methods,
    "metrics": _metrics,
    "recipes": _recipes,
    "families": _families,
    "formats": _formats,
    "executors": lambda: _registered("secateur.search.executors.registry:EXECUTORS"),
}
