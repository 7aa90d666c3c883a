"""What there is to choose from, as plain rows. Kinds that need torch are listed by the command line itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.executors.registry import EXECUTORS
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.registry import SPACES

Rows = list[dict[str, str]]


def row(name: str, summary: str, source: str = "", origin: str = "") -> dict[str, str]:
    """One line of a list.

    Args:
        name: in settings.
        summary: one line.
        source: a paper's address.
        origin: the package that adds it; empty: this one.
    """
    return {"name": name, "origin": origin, "summary": summary, "source": source}


def of_registry(registry: Mapping[str, Any]) -> Rows:
    """The rows of a registry."""
    return [row(name, x.summary, x.source, x.origin) for name, x in registry.items()]


def lines(rows: Rows) -> list[str]:
    """The rows as text, in columns; the last two, summary and source, are not padded."""
    *padded, summary, source = rows[0]
    widths = {key: max(len(row[key]) for row in rows) for key in padded}
    parts = ([*(row[key].ljust(widths[key]) for key in padded), row[summary], row[source]] for row in rows)
    return ["  ".join(part for part in line if part).rstrip() for line in parts]


def markdown(rows: Rows) -> list[str]:
    """The rows as a table in Markdown, without columns that are empty."""
    keys = [key for key in rows[0] if any(row[key] for row in rows)]
    cells = [keys, ["---"] * len(keys), *([row[key].replace("|", "\\|") for key in keys] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


LISTS: dict[str, Callable[[], Rows]] = {
    "spaces": lambda: of_registry(SPACES),
    "controllers": lambda: of_registry(CONTROLLERS),
    "evaluators": lambda: [
        row("kl", "KL divergence to the dense model, nats per token; block by block, prefixes shared"),
        row("ce", "cross-entropy of the next token, nats per token; likewise"),
    ],
    "recipes": lambda: [
        {"name": n, "unit": x.unit, "summary": x.summary, "source": x.paper} for n, x in KNOWN.items()
    ],
    "executors": lambda: of_registry(EXECUTORS),
}
