"""Versions of the installed packages whose parts settings use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from secateur.pruners.export.registry import FORMATS
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.executors.registry import EXECUTORS
from secateur.search.settings.settings import Settings, resolved
from secateur.spaces.methods import METHODS
from secateur.spaces.registry import SPACES


def versions(settings: Settings) -> dict[str, str]:
    """Version by distribution of the packages that add something that the settings name."""
    rows = [
        SPACES[settings.space.kind],
        CONTROLLERS[settings.controller.kind],
        EXECUTORS[settings.executor.kind],
    ]
    names = set(_texts(resolved(settings)["space"]))
    rows += [row for row in METHODS.values() if row.name in names]
    rows += [row for name, row in FORMATS.items() if name in names]
    return dict(sorted(row.origin.rsplit(" ", 1) for row in rows if row.origin))


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value.values()])
    elif isinstance(value, list):
        for held in value:
            yield from _texts(held)
