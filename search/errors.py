"""Error in how the program is used, as against a failure."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


DONE, FAILED, WRONG_USE, STOPPED, BUSY, UNAVAILABLE, NO_ROOM, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130
"""Exit statuses."""

STATUSES: Mapping[int, str] = MappingProxyType(
    {
        DONE: "done",
        FAILED: "failed; what was measured is safe",
        WRONG_USE: "wrong use: settings, arguments or files that can be corrected",
        STOPPED: "a search that was stopped before its budget was used up; the same command continues it",
        BUSY: "the run is being written by another process",
        UNAVAILABLE: "a cluster, a database or a hub that does not answer; try again later",
        NO_ROOM: "the disk is full; make room, and the same command continues",
        INTERRUPTED: "interrupted at once, by a second Ctrl-C or SIGTERM, or before there was anything to keep",
    }
)
"""Meanings of the exit statuses."""


class UsageError(ValueError):
    """Error in settings, arguments or files, which the user can correct. The command ends with `status`.

    The message is one line: what was expected, what was given, what to do. Any other exception is a failure
    and ends the command with status 1.
    """

    status: ClassVar[int] = WRONG_USE


class BusyError(UsageError):
    """Run that another process is writing."""

    status = BUSY


class UnavailableError(UsageError):
    """Service that does not answer, and may do so later."""

    status = UNAVAILABLE


def ran_out_of_memory(error: BaseException) -> bool:
    """True for Python's error and for those of torch, which this room does not import: of a GPU, and of the host."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
