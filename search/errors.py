"""Errors that a person can mend, told apart from failures."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Wrong use: settings, arguments or files are not what they should be. The command ends with status 2.

    The message is one line: what was expected, what came, what to do. Whatever else is raised is a failure
    and ends the command with status 1.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error about an unknown name.

    Returns:
        ``" Did you mean 'x'? Known: x, y."``, without the question where nothing known is similar.
    """
    known = sorted(known)
    similar = difflib.get_close_matches(name, known, n=1)
    question = f" Did you mean {similar[0]!r}?" if similar else ""
    return f"{question} Known: {', '.join(known)}."
