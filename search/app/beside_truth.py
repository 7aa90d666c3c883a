"""Forecast of a command beside what it took in truth, in the directories that it fills."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from secateur.search.study.foreseen import disk_bytes, read_foreseen, write_foreseen
from secateur.spaces.forecast import Forecast


@dataclass
class Filled:
    """Directories that a command has filled, and the time that its forecast is of.

    Args:
        directories: each gets a record, see `write_foreseen`; none: nothing new was made.
        seconds: of the steps that were foretold; None: from the beginning to the end.
    """

    directories: list[Path] = field(default_factory=list)
    seconds: float | None = None


@contextmanager
def beside_truth(forecast: Forecast | None, directories: Sequence[Path] = ()) -> Iterator[Filled]:
    """Context of a command, after which its forecast stands in the directories beside what it took in truth.

    A directory that has a record already keeps the larger peak of memory, and the seconds of both.

    Args:
        forecast: of the command; None: there is none, and nothing is written.
        directories: of `Filled`, to begin with.
    """
    filled = Filled(list(directories))
    if forecast is None:
        yield filled
        return
    from secateur.pruners.models.memory import forget_peak, resident_bytes

    known = [read_foreseen(directory) for directory in directories]
    forget_peak()
    started = time.perf_counter()
    yield filled
    seconds = time.perf_counter() - started if filled.seconds is None else filled.seconds
    driver, disk = float(resident_bytes("VmHWM")), float(sum(map(disk_bytes, filled.directories)))
    for index, directory in enumerate(filled.directories):
        before = known[index] if index < len(known) else None
        truth = {"driver": 0.0, "seconds": 0.0} if before is None else before[1]
        truth = {
            "driver": max(truth["driver"], driver),
            "disk": disk,
            "seconds": truth["seconds"] + seconds,
        }
        write_foreseen(directory, forecast.to_json(), truth)
