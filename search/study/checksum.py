"""Checksum of the measurements, by which readers know the lines that are as their driver wrote them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        n_bytes: length of the lines so far.
    """

    def __init__(self, path: Path, n_bytes: int) -> None:
        self._path = checksum_path(path)
        self._hash, self._n_bytes = _sha256(path, n_bytes), n_bytes
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


def n_unchanged(path: Path) -> int:
    """Number of bytes from the beginning of the file that a driver wrote so; 0 where that is unknown."""
    try:
        record = checked(checksum_path(path), _Record, "a checksum")
        same = record.bytes > 0 and _sha256(path, record.bytes).hexdigest() == record.sha256
    except (UsageError, OSError):
        return 0
    return record.bytes if same else 0


def _sha256(path: Path, n_bytes: int) -> Any:
    """Hash of so many bytes from the beginning of a file, or of all there are."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(min(n_bytes, 1 << 20)):
            found.update(part)
            n_bytes -= len(part)
    return found
