"""Plain files: a pipe from somebody else is waited for without end, a device is read without end."""

from __future__ import annotations

import stat
from pathlib import Path

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_plain(*paths: Path) -> None:
    """Raise a ValueError for a path that is a pipe, a device or a socket, also by a link; others may be missing."""
    for path in paths:
        try:
            kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
        except (OSError, ValueError):  # missing, or no name of a file
            continue
        if kind is not None:
            raise ValueError(f"Expected {path} to be a plain file, got {kind}. Remove it.")
