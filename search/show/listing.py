"""What there is to choose from, as plain rows. Kinds that need torch are listed by the command line itself."""

from __future__ import annotations

from collections.abc import Callable

from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.executors.registry import EXECUTORS
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.registry import SPACES

Rows = list[dict[str, str]]


def row(name: str, summary: str, source: str = "") -> dict[str, str]:
    """One line of a list; `source` is a paper's address."""
    return {"name": name, "summary": summary, "source": source}


def lines(rows: Rows) -> list[str]:
    """The rows as text, in columns; the last two, summary and source, are not padded."""
    *padded, summary, source = rows[0]
    widths = {key: max(len(row[key]) for row in rows) for key in padded}
    parts = ([*(row[key].ljust(widths[key]) for key in padded), row[summary], row[source]] for row in rows)
    return ["  ".join(part for part in line if part).rstrip() for line in parts]


LISTS: dict[str, Callable[[], Rows]] = {
    "spaces": lambda: [row(name, x.summary, x.source) for name, x in SPACES.items()],
    "controllers": lambda: [row(name, x.summary, x.source) for name, x in CONTROLLERS.items()],
    "evaluators": lambda: [
        row("kl", "KL divergence to the dense model, nats per token; block by block, prefixes shared"),
        row("ce", "cross-entropy of the next token, nats per token; likewise"),
    ],
    "recipes": lambda: [
        {"name": n, "unit": x.unit, "summary": x.summary, "source": x.paper} for n, x in KNOWN.items()
    ],
    "executors": lambda: [row(name, x.summary) for name, x in EXECUTORS.items()],
}
