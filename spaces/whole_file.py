"""Files written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Path of a new file, which replaces the one at `path` when the block ends; after an error neither changes.

    The new file is named like `path`, with ``.new`` at the end. Of a process that is killed it stays, until the next
    one writes.
    """
    new = path.with_name(path.name + ".new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
