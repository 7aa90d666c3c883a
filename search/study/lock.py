"""Lock of a run, one driver at a time, released by the kernel when its holder ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from secateur.search.errors import BusyError, UsageError
from secateur.spaces.plain_files import check_no_link


def writer_of(directory: Path) -> str | None:
    """Driver that writes the run, as its lock file names it; None for a process of this machine that has ended."""
    try:
        holder = json.loads((directory / RunLock.NAME).read_text(encoding="utf-8"))
        host, pid = str(holder["host"]), int(holder["pid"])
        if host == socket.gethostname():
            os.kill(pid, 0)  # sends nothing; fails if there is no such process
    except PermissionError:  # it is there, and another user's
        pass
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return f"process {pid} on {host}"


def _check_links(directory: Path) -> None:
    """Raise a UsageError for a link among the run's files; the lock of Optuna's journal is one."""
    try:
        check_no_link(*(path for path in directory.iterdir() if path.name != "optuna.log.lock"))
    except FileExistsError as error:
        raise UsageError(f"{error.strerror}: {error.filename}.") from None


class RunLock:
    """Lock ``run.lock`` of a run directory, held until it is closed or its process ends.

    The kernel releases the lock of a dead process; a file left behind locks nothing.

    Raises:
        UsageError: if a file that a driver writes in place is a link.
        BusyError: with host and process of the driver that holds it.
    """

    NAME = "run.lock"

    def __init__(self, directory: Path) -> None:
        self._path = directory / self.NAME
        _check_links(directory)
        self._lock = FileLock(self._path, blocking=False, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire()
        except Timeout:
            writer = writer_of(directory) or "another process"  # has not yet written its name
            raise BusyError(
                f"Expected {directory} to be free, got one that {writer} is writing. Wait for it, or stop it."
            ) from None
        self._path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))

    def close(self) -> None:
        """Release the lock. May be called twice."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # the directory may be gone
                os.truncate(self._path, 0)
            self._lock.release()
