"""Relative paths, looked for where the settings file was, then where the search was started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def located(name: str, folders: Sequence[Path]) -> str:
    """Path in the first folder that has it; the name as it is, if none has, or the working directory comes first.

    Args:
        name: of a file or directory; one that is absolute, or begins with ``~``, is left alone.
        folders: absolute.
    """
    path = Path(name)
    if path.is_absolute() or name.startswith("~"):
        return name
    here = Path.cwd()
    for folder in folders:
        if (folder / path).exists():
            return name if folder == here else str(folder / path)
    return name
