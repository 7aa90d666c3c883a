"""Suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.6  # of difflib's ratio


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Question to append to an error about an unknown name, such as `` Did you mean 'x'?``.

    Empty if no known name is similar; case is ignored.
    """
    by_lower = {each.lower(): each for each in known}
    similar = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=CUTOFF)
    similar = similar or [
        each for each in by_lower if sorted(each) == sorted(name.lower())
    ]  # swapped letters
    return f" Did you mean {by_lower[similar[0]]!r}?" if similar else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """The question of `did_you_mean`, and all known names, such as `` Did you mean 'x'? Known: x, y.``."""
    known = sorted(known)
    return f"{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}."
