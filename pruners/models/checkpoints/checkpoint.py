"""A model's files, found and identified, before anything is built from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

Say = Callable[[str], None]
"""Given progress, one line at a time."""


def silent(line: str) -> None:
    """Say nothing."""


class ModelError(ValueError):
    """A model that cannot be found or loaded; its message is one line for the person who named it."""


@dataclass(frozen=True)
class Checkpoint:
    """Files that transformers can load.

    Args:
        location: a directory, or a hub id if `revision` is given.
        source: where they come from, for people.
        identify: computes `fingerprint`; it may read all of the files.
        revision: commit on the hub.
    """

    location: str
    source: str
    identify: Callable[[], str]
    revision: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Identity of their content, equal for equal models from one kind of source; computed once."""
        return self.identify()


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The first line of an error's text, without the full stop, cut to `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text[:limit].rstrip(". ")
