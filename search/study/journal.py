"""Measurements of a study: an append-only file, one a line."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
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
    found: dict[tuple[str, str], Measurement] = {}
    bad: UsageError | None = None
    end, n_found, unchanged = start, 0, 0 if start else n_unchanged(path)
    with no_collection(), path.open("rb") if path.exists() else io.BytesIO() as file:
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            if bad is not None:  # and not the last line
                raise bad
            try:
                read_line(line, found, known)
            except LINE_ERRORS as error:
                bad = _refusal(
                    line, f"line {number}{f' after byte {start}' if start else ''} of {path}", error
                )
                if _is_json(line):
                    raise bad from None
                continue  # torn, if it is the last
            end += len(line)
            if end <= unchanged:
                n_found = len(found)
        n_torn = file.tell() - end
        if not start:
            gc.freeze()  # nor does the collector walk through a whole study later
    return JournalContent(tuple(found.values()), end, n_torn, n_found)


def read_line(
    line: bytes, found: dict[tuple[str, str], Measurement], known: Mapping[tuple[str, str], Trial]
) -> Measurement:
    """Measurement in a line.

    Args:
        line: with or without its end.
        found: measurements of the lines before, by key; a new one is added.
        known: trials before those.

    Raises:
        ValueError, KeyError, AttributeError, OverflowError: if the line is no measurement or contradicts one before:
            `LINE_ERRORS`.
    """
    measurement = Measurement.from_json(from_json(line, cache_strings="keys"))
    key = measurement.key
    same = known[key].measurement if key in known else found.setdefault(key, measurement)
    if same is not measurement and same.values != measurement.values:
        raise ValueError("the values differ from those of the same candidate and fidelity before")
    return measurement


LINE_ERRORS = (ValueError, KeyError, AttributeError, OverflowError)


def _refusal(line: bytes, where: str, error: Exception) -> UsageError:
    shown = line[:40].rstrip(b"\n").decode(errors="replace")
    return UsageError(
        f"Expected a measurement in {where}, got {shown!r} ({type(error).__name__}: {error}). Restore the line, or "
        f"remove it (`secateur doctor RUN --repair`)."
    )


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
