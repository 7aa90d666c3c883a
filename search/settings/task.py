"""Settings of objectives ``task:<name>``."""

from __future__ import annotations

from pydantic import Field

from secateur.spaces.section import Section


class TaskSettings(Section):
    """Files and samples of tasks, measured at the largest fidelity of the search.

    Args:
        directory: of task files, YAML as lm-eval reads them, with their data beside them.
        samples: of each task, the same for every candidate; None for all.
        batch: sequences that go through the model together.
    """

    directory: str
    samples: int | None = Field(default=100, gt=0)
    batch: int = Field(default=8, gt=0)
