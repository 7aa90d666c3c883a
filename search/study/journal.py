"""Measurements of a study: an append-only file, one a line."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pydantic_core import from_json

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.files import no_room
from secateur.search.study.checksum import n_unchanged
from secateur.spaces.measurement import Measurement

FLUSH_S = 0.5
"""Measurements are flushed to the disk at most so often: workers with short evaluations would wait for the disk. What a
process wrote outlives it without; a machine that goes down takes what came since the last flush with it, and that is
measured again."""


@dataclass(frozen=True)
class JournalContent:
    """Content of a file of measurements.

    Args:
        measurements: in file order, the first one of each key.
        n_bytes: length of the whole lines from the beginning of the file.
        n_torn: bytes after them, of a line whose writer was killed.
        n_unchanged: measurements at the beginning in lines that are as their driver wrote them, by its checksum.
    """

    measurements: tuple[Measurement, ...]
    n_bytes: int
    n_torn: int
    n_unchanged: int = 0


def read_journal(
    path: Path, start: int = 0, known: Mapping[tuple[str, str], Trial] = MappingProxyType({})
) -> JournalContent:
    """Content of a file of measurements; a missing file is empty, and a torn last line is left out.

    Args:
        path: the file.
        start: bytes of whole lines that were read before.
        known: trials in them, by key; those are left out.

    Raises:
        UsageError: on a line, other than a torn last one, that is no measurement or contradicts one before.
    """
    data = _read_from(path, start)
    lines, unchanged = data.split(b"\n"), 0 if start else n_unchanged(path, data)
    end = len(data) - len(lines.pop())  # what follows the last newline is torn, or empty
    if lines and not _is_json(lines[-1]):
        end -= len(lines.pop()) + 1
    found: dict[tuple[str, str], Measurement] = {}
    n_found = n_read = 0
    after = f" after byte {start}" if start else ""
    with no_collection():
        for number, (line, read) in enumerate(zip(lines, lines_of(lines, known), strict=True), start=1):
            if isinstance(read, Exception):
                shown = line[:40].decode(errors="replace")
                raise UsageError(
                    f"Expected a measurement in line {number}{after} of {path}, got {shown!r} ({type(read).__name__}: "
                    f"{read}). Restore the line, or remove it (`secateur doctor RUN --repair`)."
                )
            found.setdefault(read.key, read)
            n_read += len(line) + 1
            n_found = len(found) if n_read <= unchanged else n_found
    new = tuple(measurement for key, measurement in found.items() if key not in known)
    return JournalContent(new, start + end, len(data) - end, n_found)


def lines_of(
    lines: Iterable[bytes], known: Mapping[tuple[str, str], Trial]
) -> Iterator[Measurement | Exception]:
    """Measurement of each line, or the error of a line that is none or contradicts one before.

    Args:
        lines: without their ends.
        known: trials before them.
    """
    first: dict[tuple[str, str], Mapping[str, float]] = {}
    for line in lines:
        try:
            measurement = Measurement.from_json(from_json(line, cache_strings="keys"))
            key = measurement.key
            values = (
                known[key].measurement.values if key in known else first.setdefault(key, measurement.values)
            )
            if values is not measurement.values and values != measurement.values:
                raise ValueError("the values differ from those of the same candidate and fidelity before")
        except (ValueError, KeyError, AttributeError, OverflowError) as error:
            yield error
        else:
            yield measurement


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause of the garbage collector, which walks through many new objects again and again for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_from(path: Path, start: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def _is_json(line: bytes) -> bool:
    try:
        from_json(line)
    except ValueError:
        return False
    return True


class Appender:
    """Append-only file whose batches of lines are written whole or not at all.

    Args:
        path: the file; made if it is missing.
        n_bytes: length of its whole lines; anything after them is cut off.
        flush_s: flush to the disk if the last time is so many seconds ago, and when it is closed; None: never.
    """

    def __init__(self, path: Path, n_bytes: int, *, flush_s: float | None = None) -> None:
        self._path = path
        self._n_bytes = n_bytes
        self._flush_s = flush_s
        self._flushed_at = -math.inf
        self._waits = False  # for a flush
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.fstat(self._fd).st_size > n_bytes:
            os.ftruncate(self._fd, n_bytes)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the new name
        finally:
            os.close(directory)

    def append(self, lines: Sequence[str], safe: str) -> None:
        """Write a batch, or leave the file as it was.

        Args:
            lines: without their ends.
            safe: note for the error on what is not lost.

        Raises:
            StudyWriteError: if there is no room.
            OSError: if writing fails otherwise.
        """
        data = "".join(line + "\n" for line in lines).encode()
        try:
            self._write(data)
            self._waits = self._flush_s is not None
            if self._flush_s is not None and time.monotonic() - self._flushed_at >= self._flush_s:
                os.fsync(self._fd)
                self._flushed_at, self._waits = time.monotonic(), False
        except OSError as error:
            with contextlib.suppress(
                OSError
            ):  # of a file system that takes nothing more; a torn line is cut off later
                os.ftruncate(self._fd, self._n_bytes)
            raise no_room(error, self._path, safe) from error
        self._n_bytes += len(data)

    def _write(self, data: bytes) -> None:
        position = self._n_bytes
        while data:  # a nearly full disk takes a part
            n = os.pwrite(self._fd, data, position)
            data, position = data[n:], position + n

    def close(self) -> None:
        """May be called twice.

        Raises:
            StudyWriteError: if there is no room for what was not flushed yet.
        """
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            if self._waits:
                os.fsync(fd)
        except OSError as error:
            raise no_room(
                error, self._path, f"all but those of the last {self._flush_s} s are safe"
            ) from error
        finally:
            os.close(fd)
