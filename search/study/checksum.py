"""Checksum of the measurements, by which readers know the lines that are as their driver wrote them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.search.errors import UsageError
from secateur.search.files import checked
from secateur.spaces.whole_file import whole_file

SECONDS_BETWEEN_WRITES = 5.0


@dataclass(frozen=True)
class _Record:
    """Number of bytes from the beginning of the file, and their SHA-256 in hexadecimal digits."""

    bytes: int
    sha256: str


class Checksum:
    """SHA-256 of whole lines, written beside them every few seconds and at the end.

    It spares readers of long studies the parsing of every candidate. Without one, as after a kill for the last few
    seconds, or with another one, lines are parsed; a disk that is full is reported by the study.

    Args:
        path: of the measurements.
        written: content of the file so far.
    """

    def __init__(self, path: Path, written: bytes) -> None:
        self._path = checksum_path(path)
        self._hash, self._n_bytes = hashlib.sha256(written), len(written)
        self._due = time.monotonic()

    def add(self, lines: Sequence[str]) -> None:
        """Take note of lines that were appended, without their ends."""
        data = "".join(line + "\n" for line in lines).encode()
        self._hash.update(data)
        self._n_bytes += len(data)
        if time.monotonic() >= self._due:
            self.write()
            self._due = time.monotonic() + SECONDS_BETWEEN_WRITES

    def write(self) -> None:
        """Write the file; a failure leaves the old one."""
        text = json.dumps(vars(_Record(self._n_bytes, self._hash.hexdigest()))) + "\n"
        with contextlib.suppress(OSError), whole_file(self._path) as new:
            new.write_text(text, encoding="utf-8")


def checksum_path(path: Path) -> Path:
    """The file beside the measurements."""
    return path.with_suffix(".sha256")


def n_unchanged(path: Path, data: bytes) -> int:
    """Number of bytes from the beginning of the data that a driver wrote so; 0 where that is unknown."""
    try:
        record = checked(checksum_path(path), _Record, "a checksum")
    except UsageError:
        return 0
    same = 0 < record.bytes <= len(data) and hashlib.sha256(data[: record.bytes]).hexdigest() == record.sha256
    return record.bytes if same else 0
