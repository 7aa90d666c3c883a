"""Notes of a controller, such as counts and correlations, stored in the run for display."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from secateur.search.budget import Spent
from secateur.search.controller import Controller, Trial
from secateur.search.loop.loop import Observer, Outcome
from secateur.spaces.whole_file import whole_file

NAME = "notes.json"
SECONDS_BETWEEN_WRITES = 5.0

Notes = Mapping[str, float]


class NotesKeeper(Observer):
    """Observer that writes a controller's notes into the run every few seconds and at the end.

    They are for display only: a resumed search doesn't read them, and a full disk is ignored.

    Args:
        directory: of the run.
        kind: of the controller.
        controller: source of the notes.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        controller: Controller,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = directory / NAME
        self._kind = kind
        self._controller = controller
        self._clock = clock
        self._due = clock()

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        if self._clock() >= self._due:
            self._write()
            self._due = self._clock() + SECONDS_BETWEEN_WRITES

    def on_end(self, outcome: Outcome) -> None:
        self._write()

    def _write(self) -> None:
        notes = dict(self._controller.notes)
        if not notes:
            return
        with (
            contextlib.suppress(OSError),
            whole_file(self._path) as new,
        ):  # a full disk is reported by the study
            new.write_text(json.dumps({"controller": self._kind, "notes": notes}) + "\n", encoding="utf-8")


def read_notes(directory: Path, kind: str) -> dict[str, float]:
    """Notes of a run's controller; empty if it has none or is of another kind."""
    try:
        content = json.loads((directory / NAME).read_text(encoding="utf-8"))
        return dict(content["notes"]) if content["controller"] == kind else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def notes_line(notes: Notes) -> str:
    """One line for display: counts with their names, then names with their values."""
    counts, values = list[str](), list[str]()
    for key, value in notes.items():
        name = key.replace("_", " ")
        if isinstance(value, int):
            counts.append(f"{value:,} {name}")
        else:
            values.append(f"{name} {value:g}")
    return ", ".join([*counts, *values])
