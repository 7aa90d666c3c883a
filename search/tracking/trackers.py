"""Table of experiment trackers, opened through `accelerate.tracking`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from secateur.search.errors import UsageError

TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]
PROJECT = "secateur"
"""Project, or experiment, that runs are in; a run has the name of its directory."""


class Tracker(Protocol):
    """What `accelerate.tracking.GeneralTracker` has, as far as a search uses it."""

    def start(self) -> None:
        """Begin a run of the tracker."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep settings, by name."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Keep values of a step."""

    def finish(self) -> None:
        """End the run of the tracker."""


@dataclass(frozen=True)
class TrackerRow:
    """A tracker of `accelerate.tracking`.

    Args:
        class_name: there.
        modules: one of these must be installed.
        arguments: of the class, for the directory of a run.
    """

    class_name: str
    modules: tuple[str, ...]
    arguments: Callable[[Path], Mapping[str, Any]]


TRACKERS: Mapping[TrackerName, TrackerRow] = MappingProxyType(
    {
        # purge_step: of a search that is continued, the steps logged before are replaced.
        "tensorboard": TrackerRow(
            "TensorBoardTracker",
            ("tensorboard", "tensorboardX"),
            lambda run: {"run_name": "tensorboard", "logging_dir": run, "purge_step": 0},
        ),
        "mlflow": TrackerRow(
            "MLflowTracker", ("mlflow",), lambda run: {"experiment_name": PROJECT, "run_name": run.name}
        ),
        "wandb": TrackerRow(
            "WandBTracker", ("wandb",), lambda run: {"run_name": PROJECT, "name": run.name, "dir": str(run)}
        ),
        "trackio": TrackerRow(
            "TrackioTracker", ("trackio",), lambda run: {"run_name": PROJECT, "name": run.name}
        ),
    }
)


def check_trackers(names: Iterable[TrackerName]) -> None:
    """Raise a UsageError unless accelerate and the trackers' packages are installed."""
    for name in names:
        if find_spec("accelerate") is None:
            raise UsageError(
                f"Expected accelerate for `track: {name}`, got none. Install it: pip install 'secateur[track]'."
            )
        if not any(find_spec(module) for module in TRACKERS[name].modules):
            raise UsageError(
                f"Expected {name} for `track: {name}`, got none. Install it: pip install {name}."
            )


def open_tracker(name: TrackerName, directory: Path) -> Tracker:
    """A tracker that has begun a run, to be used in the thread that opened it.

    Raises:
        Exception: whatever the tracker raises, e.g. where its server does not answer.
    """
    from accelerate import PartialState, tracking

    PartialState()  # which accelerate's log lines ask for
    row = TRACKERS[name]
    tracker: Any = getattr(tracking, row.class_name)(**row.arguments(directory.resolve()))
    tracker.start()
    return tracker  # type: ignore[no-any-return]
