"""Repair of a file of measurements: lines that can't be used are set aside, into a file beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.search.study.checksum import checksum_path
from secateur.search.study.journal import LINE_ERRORS, read_line
from secateur.search.study.lock import RunLock
from secateur.search.study.study import MEASUREMENTS
from secateur.spaces.measurement import Measurement
from secateur.spaces.whole_file import whole_file

ASIDE = "measurements.bad.jsonl"


@dataclass(frozen=True)
class BadLine:
    """A line that can't be used.

    Args:
        number: from 1 on.
        reason: in one line.
        content: its bytes, without the end.
    """

    number: int
    reason: str
    content: bytes


def bad_lines(directory: Path, parse: Callable[[str], object]) -> list[BadLine]:
    """Lines of a run that are no measurements, contradict one before, or are of a candidate that `parse` refuses.

    A torn last line is none: the next driver cuts it off.

    Args:
        parse: raises a ValueError for the text of a candidate of another space.
    """
    path, found = directory / MEASUREMENTS, list[BadLine]()
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    known: dict[str, str] = {}  # reasons, "" for candidates of the space
    before: dict[tuple[str, str], Measurement] = {}
    for number, line in enumerate(lines, start=1):
        try:
            reason = _refused(read_line(line, before, {}).candidate, parse, known)
        except LINE_ERRORS as error:
            reason = str(error)
        if reason:
            found.append(BadLine(number, " ".join(reason.split())[:200], line))
    return found


def _refused(text: str, parse: Callable[[str], object], known: dict[str, str]) -> str:
    if text not in known:
        try:
            parse(text)
            known[text] = ""
        except ValueError as error:
            known[text] = str(error) or "no candidate of the space"
    return known[text]


def set_aside(directory: Path, bad: Sequence[BadLine]) -> Path:
    """Move lines into a file of their own, after those of earlier repairs; numbers of later trials move up.

    Returns:
        That file.

    Raises:
        UsageError: if a process is writing the run.
        OSError: if a file can't be written; the measurements are then unchanged.
    """
    lock = RunLock(directory)
    try:
        path, aside, numbers = directory / MEASUREMENTS, directory / ASIDE, {line.number for line in bad}
        with aside.open("ab") as file:
            file.write(b"".join(line.content + b"\n" for line in bad))
            file.flush()
            os.fsync(file.fileno())
        lines = path.read_bytes().split(b"\n")
        kept = [line for number, line in enumerate(lines, start=1) if number not in numbers]
        with whole_file(path) as new, new.open("wb") as file:
            file.write(b"\n".join(kept))
            file.flush()
            os.fsync(file.fileno())
        checksum_path(path).unlink(missing_ok=True)  # of other lines
    finally:
        lock.close()
    return aside
