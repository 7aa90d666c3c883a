"""Result of one check of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Args:
        name: of what was checked.
        found: state that was found.
        ok: False if a search would fail, or something is damaged; None for mere information.
    """

    name: str
    found: str
    ok: bool | None = True
