"""Sources of the methods that a search uses: a part of its identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from secateur.search.settings.settings import Settings, resolved
from secateur.search.study.about import About
from secateur.spaces.method_table import METHODS
from secateur.spaces.methods import own_row

PREFIX = "source of "


def method_sources(settings: Settings) -> dict[str, str]:
    """Hash of the source of each method that the space may use, by its place in the table."""
    space = settings.space
    names = {*texts_in(resolved(settings)["space"]), *space.method_names}
    rows = {key: row for key, row in METHODS.items() if row.name in names}
    own = {name: own_row(name, "metric", "weights") for name in space.method_names}
    rows |= {f"metric/weights/{name}": row for name, row in own.items() if row is not None}
    return {PREFIX + key: row.source for key, row in rows.items()}


def recorded_sources(settings: Settings, about: About) -> dict[str, str]:
    """`method_sources`, as far as a study records any."""
    recorded = about.identity.get("content", {})
    has_some = any(name.startswith(PREFIX) for name in recorded)
    return method_sources(settings) if has_some else {}


def texts_in(value: Any) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in([*value.values()])
    elif isinstance(value, list):
        for held in value:
            yield from texts_in(held)
