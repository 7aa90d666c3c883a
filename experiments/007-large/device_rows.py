"""Rows of the table of a checked GPU, and how a part is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Row:
    """One line of the table.

    Args:
        part: of the check.
        seconds: that it took.
        values: measured, by name with units.
        aim: that it is to meet; empty: none.
        met: whether it does; None: nothing to meet, or skipped.
        error: why there is no result; empty: none.
    """

    part: str
    seconds: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    aim: str = ""
    met: bool | None = None
    error: str = ""


Part = Callable[[Row], None]
"""One part of the check, which fills its row."""


@dataclass(frozen=True)
class Checked:
    """The device that is checked.

    Args:
        device: the GPU; a CPU with small shapes.
        directory: for stores.
        small: small shapes.
    """

    device: torch.device
    directory: Path
    small: bool

    @contextmanager
    def measured(self, row: Row) -> Iterator[None]:
        """Seconds and, on a GPU, the peak of its memory."""
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        yield
        self.wait()
        row.values["s"] = time.perf_counter() - began
        n_bytes = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        row.values["GB"] = n_bytes / 1e9

    def aim(self, row: Row, aim: str, met: bool) -> None:
        """Aims are of the large shapes on a GPU."""
        if not self.small:
            row.aim, row.met = aim, met

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def line_of(row: Row) -> str:
    """A row of the table."""
    worst = (
        dict(sorted(row.values.items(), key=lambda x: -x[1])[:3]) if "equality" in row.part else row.values
    )
    values = ", ".join(f"{name} {value:.4g}" for name, value in worst.items())
    met = {True: "ok", False: "NOT MET", None: ""}[row.met]
    return f"{row.part:<36} {row.seconds:>7.1f} s  {row.error or values}  {row.aim}  {met}".rstrip()
