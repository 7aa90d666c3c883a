"""Atomic writes: a new file replaces the old one when it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.spaces.plain_files import check_no_link


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Path of a new file, which replaces `path` at the end of the block; after an error `path` is unchanged.

    The new file is `path` with the suffix ``.new``. A killed process leaves it behind for the next write to overwrite.
    """
    new = path.with_name(path.name + ".new")
    check_no_link(new)
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
