"""Notes of a controller, such as counts and correlations, stored in the run for display."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import FiniteFloat

from secateur.search.budget import Spent
from secateur.search.controller import Controller, Trial
from secateur.search.files import checked
from secateur.search.loop.loop import Observer, Outcome
from secateur.spaces.whole_file import whole_file

NAME = "notes.json"
SECONDS_BETWEEN_WRITES = 5.0


class NotesKeeper(Observer):
    """Observer that writes a controller's notes into the run every few seconds and at the end.

    They are for display only: a resumed search doesn't read them, and a full disk is ignored.
    """

    def __init__(self, directory: Path, kind: str, controller: Controller) -> None:
        self._path = directory / NAME
        self._kind = kind
        self._controller = controller
        self._due = time.monotonic()

    def on_trials(self, trials: Sequence[Trial], spent: Spent) -> None:
        if time.monotonic() >= self._due:
            self._write()
            self._due = time.monotonic() + SECONDS_BETWEEN_WRITES

    def on_end(self, outcome: Outcome) -> None:
        self._write()

    def _write(self) -> None:
        notes = dict(self._controller.notes)
        text = json.dumps({"controller": self._kind, "notes": notes}) + "\n"
        if notes:
            with contextlib.suppress(OSError), whole_file(self._path) as new:  # the study reports a full disk
                new.write_text(text, encoding="utf-8")


def read_notes(directory: Path, kind: str) -> dict[str, float]:
    """Notes of a run's controller; empty if it has none or is of another kind."""
    try:
        content = json.loads((directory / NAME).read_text(encoding="utf-8"))
        notes = checked(json.dumps(content["notes"]), dict[str, int | FiniteFloat], NAME)
        return notes if content["controller"] == kind else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def notes_line(notes: Mapping[str, float]) -> str:
    """One line for display: counts with their names, then names with their values."""
    named = [(key.replace("_", " "), value) for key, value in notes.items()]
    counts = [f"{value:,} {name}" for name, value in named if isinstance(value, int)]
    values = [f"{name} {value:g}" for name, value in named if not isinstance(value, int)]
    return ", ".join([*counts, *values])
