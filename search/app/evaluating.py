"""Perplexity of any model, and its scores in tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import usage_errors
from secateur.search.errors import UsageError

if TYPE_CHECKING:
    from secateur.evaluators.tasks.task_set import TaskPlan


@usage_errors()
def evaluate(model: str, *, verify: bool = False, **measured: Any) -> dict[str, float | str | int]:
    """Perplexity of a model, its share of zero weights, and its scores in tasks; see `evaluate_model`.

    Raises:
        UsageError: if the model, the text or a task is wrong, or with `verify` a file of the export is damaged.
    """
    from secateur.evaluators.perplexity import evaluate_model
    from secateur.pruners.export.manifest import check_files

    path = Path(model).expanduser()  # of a directory, or of a GGUF file in one
    verified = {"verified_files": check_files(path.parent if path.is_file() else path)} if verify else {}
    return {**evaluate_model(model, **measured), **verified}


@usage_errors()
def tasks_in(
    names: Sequence[str], directory: Path | None, samples: int | None, *, trusted: bool = False
) -> TaskPlan | None:
    """The tasks with these names; None if there are none.

    Args:
        names: of tasks.
        directory: of their files, YAML as lm-eval reads them, with their data beside them.
        samples: of each task; None for all.
        trusted: let the task files run code.

    Raises:
        UsageError: if tasks have no directory or files that `TaskPlan` refuses, or `samples` is out of range.
    """
    from secateur.evaluators.tasks.task_set import TaskPlan

    if samples is not None and samples < 1:
        raise UsageError(f"Expected `--samples` >= 1, got {samples}.")
    if names and directory is None:
        raise UsageError(f"Expected `--task-dir` with the files of {', '.join(names)}, got nothing.")
    return TaskPlan(tuple(names), directory, samples, trusted=trusted) if names and directory else None
