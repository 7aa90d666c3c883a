"""State of a run, in a small file of its own: what its driver is doing, or how it ended and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from secateur.search.files import replace_file
from secateur.search.study.lock import writer_of

State = Literal["preparing", "running", "stopped", "failed", "finished"]
STATES: tuple[State, ...] = get_args(State)
STATE, LOG = "state.json", "search.log"
GONE = "its process is gone, killed or with its machine"


@dataclass(frozen=True)
class RunState:
    """State of a run.

    Args:
        state: ``preparing`` (model, texts and levels), ``running``, ``stopped`` (before its end, by a person or a batch
            system), ``failed``, or ``finished``.
        reason: why it stopped, failed or finished, or what is being prepared.
        since: time of the change, ISO 8601 in UTC.
    """

    state: State
    reason: str = ""
    since: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def write_state(directory: Path, state: State, reason: str = "") -> None:
    """Write the state, whole or not at all.

    Raises:
        StudyWriteError: if the disk is full.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    replace_file(directory / STATE, json.dumps(RunState(state, reason, now).to_json()) + "\n")


def read_state(directory: Path) -> RunState | None:
    """State of the run; ``failed`` if its driver has gone without a word; None if there is none, as in runs of old."""
    try:
        found: Any = json.loads((directory / STATE).read_text(encoding="utf-8"))
        state = RunState(*(str(found[key]) for key in ("state", "reason", "since")))  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if state.state not in STATES:
        return None
    if state.state in ("preparing", "running") and writer_of(directory) is None:
        return RunState("failed", GONE, state.since)
    return state


def state_words(state: RunState) -> str:
    """State and reason for people, such as ``finished: its budget is used up``."""
    return f"{state.state}: {state.reason}" if state.reason else state.state
