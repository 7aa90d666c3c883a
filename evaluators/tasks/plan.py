"""Which tasks, as plain values that travel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TaskPlan:
    """What is to be measured.

    Args:
        names: of the tasks, as their files say.
        directory: of the task files (YAML as lm-eval reads them), with their data beside them.
        samples: of each task, the same ones for every model; None for all.
        batch: sequences that go through the model together.
        seed: which samples; those of a smaller number are among those of a larger one.
    """

    names: tuple[str, ...]
    directory: Path
    samples: int | None = None
    batch: int = 8
    seed: int = 0
