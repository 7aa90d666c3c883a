"""Plain files: from somebody else a pipe is waited for and a device read without end, and a link leads anywhere."""

from __future__ import annotations

import errno
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


def check_no_link(*paths: Path) -> None:
    """Raise an OSError for a path that is about to be written, or written into, and is a link.

    A run may come from somebody else, and what is written through its links would land outside it.
    """
    for path in paths:
        if path.is_symlink():
            kind = "directory" if path.is_dir() else "file"
            raise FileExistsError(
                errno.EEXIST,
                f"Expected a {kind} of its own, got a link to {path.readlink()}. Remove it",
                str(path),
            )
