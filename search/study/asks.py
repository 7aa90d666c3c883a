"""When a controller was asked: what an asynchronous search needs to be continued, beside its measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.search.study.journal import Appender


@dataclass(frozen=True)
class Ask:
    """One call of `Controller.ask` that was answered.

    Args:
        told: trials that the study held by then, all of which the controller had been told.
        n: how many proposals were asked for.
    """

    told: int
    n: int


@dataclass(frozen=True)
class _Begin:
    """Since when a controller is asked, and which one."""

    first: int
    about: Mapping[str, Any]


class AskLog:
    """The calls of `Controller.ask` in order, one a line, between the trials that they came between.

    Where results come in whatever order, what a controller proposes depends on when it was asked. With this
    log the calls are made once more in the same order, and whatever was under way is known again.

    A controller or seed that is new to the log begins a section of its own; earlier sections are left as they are.
    The log is written before the jobs that follow from it, so that the death of the process loses nothing. It is not
    flushed to the disk each time: if the machine itself dies, its end may be lost, but no measurement is.

    Args:
        path: the file; made if it is missing.
        about: plain values that the proposals depend on, apart from the measurements.
        n_trials: trials in the study.
    """

    NAME = "asks.jsonl"

    def __init__(self, path: Path, about: Mapping[str, Any], n_trials: int) -> None:
        about = json.loads(json.dumps(about, default=dict))  # as a later reader will see it
        sections, n_bytes = _read(path)
        begin, asks = sections[-1] if sections else (None, [])
        self._file = Appender(path, n_bytes)
        self._synced = True
        seen = max((ask.told for ask in asks), default=0 if begin is None else begin.first)
        if begin is None or begin.about != about or seen > n_trials:
            begin, asks = _Begin(n_trials, about), []
            self._write(begin)
        self._begin = begin
        self._asks = asks

    @property
    def first(self) -> int:
        """Trials that the study held before the controller was asked for the first time."""
        return self._begin.first

    @property
    def asks(self) -> Sequence[Ask]:
        """The calls so far."""
        return self._asks

    def add(self, ask: Ask) -> None:
        """Note a call.

        Raises:
            StudyWriteError: if there is no room.
        """
        self._write(ask)
        self._asks.append(ask)

    def close(self) -> None:
        """May be called twice."""
        self._file.close()

    def _write(self, line: Ask | _Begin) -> None:
        self._file.append([json.dumps(asdict(line))], "all measurements are safe")


def _read(path: Path) -> tuple[list[tuple[_Begin, list[Ask]]], int]:
    """The sections, and the length of the whole lines; a torn or damaged end is left out."""
    data = path.read_bytes() if path.exists() else b""
    sections: list[tuple[_Begin, list[Ask]]] = []
    n_bytes = 0
    for line in data.splitlines(keepends=True):
        try:
            values = json.loads(line) if line.endswith(b"\n") else {}
            if "about" in values:
                sections.append((_Begin(**values), []))
            else:
                sections[-1][1].append(Ask(**values))
        except (ValueError, TypeError, IndexError):
            break
        n_bytes += len(line)
    return sections, n_bytes
