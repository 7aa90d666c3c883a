"""One driver a study: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path

from secateur.search.errors import UsageError


def writer_of(directory: Path) -> str | None:
    """Who is writing the run, as far as its lock file tells; a process of this machine that is gone doesn't count."""
    try:
        holder = json.loads((directory / RunLock.NAME).read_text(encoding="utf-8"))
        host, pid = str(holder["host"]), int(holder["pid"])
        if host == socket.gethostname():
            os.kill(pid, 0)  # sends nothing; fails if there is no such process
    except PermissionError:  # it is there, and another user's
        pass
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"process {pid} on {host}"


class RunLock:
    """Holds ``run.lock`` in a run directory until it is closed or its process ends.

    The kernel releases the lock of a dead process, so a file that is left behind holds nobody up.

    Args:
        directory: the run, existing.

    Raises:
        UsageError: with host and process of the driver that holds it.
    """

    NAME = "run.lock"

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / self.NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            os.close(self._fd)
            raise UsageError(
                f"Expected {directory} to be free, got one that {holder} is writing. Wait for it, or stop it."
            ) from None
        except OSError:
            os.close(self._fd)
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)

    def _holder(self) -> str:
        try:
            holder = json.loads(os.pread(self._fd, 4096, 0))
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):  # it has the lock and has not yet written who it is
            return "another process"

    def close(self) -> None:
        """Let the next driver in. May be called twice."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)  # releases the lock
            self._fd = -1
