"""Log of a controller's asks, from which an asynchronous search is resumed by replay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from secateur.search.study.journal import Appender


@dataclass(frozen=True)
class Ask:
    """Answered call of `Controller.ask`.

    Args:
        told: trials of the study at that time, all of which the controller had been told.
        n: number of proposals asked for.
    """

    told: int
    n: int


@dataclass(frozen=True)
class _Begin:
    """Start of a section: the controller, and the number of trials before its first ask."""

    first: int
    about: Mapping[str, Any]


class AskLog:
    """Calls of `Controller.ask` in order, one a line, each with the number of trials known at the time.

    Where results arrive in any order, proposals depend on when the controller was asked. A search is resumed by
    repeating the calls in the same order, which also gives the candidates that were in flight.

    Another controller or seed starts a new section; earlier sections stay. The log is written before the jobs that
    follow from it, so that a killed process loses nothing. It is not flushed to the disk each time: a machine that goes
    down may lose its end, but no measurement.

    Args:
        path: the file; made if it is missing.
        about: plain values that the proposals depend on, apart from the measurements.
        n_trials: trials in the study.
    """

    NAME = "asks.jsonl"

    def __init__(self, path: Path, about: Mapping[str, Any], n_trials: int) -> None:
        about = json.loads(json.dumps(about, default=dict))  # as it will be read back
        sections, n_bytes = _read(path)
        begin, asks = sections[-1] if sections else (None, [])
        self._file = Appender(path, n_bytes)
        seen = max((ask.told for ask in asks), default=0 if begin is None else begin.first)
        if begin is None or begin.about != about or seen > n_trials:
            begin, asks = _Begin(n_trials, about), []
            self._write(begin)
        self.first = begin.first  # number of trials before the controller's first ask
        self.asks = asks  # calls so far

    def add(self, ask: Ask) -> None:
        """Append a call.

        Raises:
            StudyWriteError: if there is no room.
        """
        self._write(ask)
        self.asks.append(ask)

    def close(self) -> None:
        """May be called twice."""
        self._file.close()

    def _write(self, line: Ask | _Begin) -> None:
        self._file.append([json.dumps(asdict(line))], "all measurements are safe")


def _read(path: Path) -> tuple[list[tuple[_Begin, list[Ask]]], int]:
    """Sections, and the length of the whole lines; a torn or damaged end is left out."""
    data = path.read_bytes() if path.exists() else b""
    sections: list[tuple[_Begin, list[Ask]]] = []
    n_bytes, entries = 0, TypeAdapter[Ask | _Begin](Ask | _Begin)
    for line in data.splitlines(keepends=True):
        try:
            entry = entries.validate_json(line if line.endswith(b"\n") else b"", strict=True)
            if isinstance(entry, Ask):
                sections[-1][1].append(entry)
            else:
                sections.append((entry, []))
        except (ValueError, IndexError):
            break
        n_bytes += len(line)
    return sections, n_bytes
