"""A model's files, found and identified, before anything is built from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from secateur.spaces.limited_text import without_controls

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
    """The first line of an error's text, and the next where it ends with a colon, without colours and full stop.

    Args:
        limit: of its characters.
    """
    lines = [line.strip() for line in without_controls(str(error)).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    return text[:limit].rstrip(". ")
