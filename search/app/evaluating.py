"""Measure any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.search.app.session import Say, silent
from secateur.search.errors import UsageError

if TYPE_CHECKING:
    from secateur.evaluators.tasks.plan import TaskPlan


def evaluate(
    model: str,
    *,
    text: str = "docs",
    part: str = "test",
    n_tokens: int = 8192,
    window: int = 512,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    tasks: TaskPlan | None = None,
    say: Say = silent,
) -> dict[str, float | str | int]:
    """Perplexity of a model on a text, in windows without overlap, how many of its weights are zero, and tasks.

    Args:
        model: see `load_model`.
        text: source of text; of ``docs`` the topics of `part`.
        n_tokens: tokens to measure on, a multiple of `window`.
        window: tokens that the model sees at once.
        tasks: to measure it in, too; see `tasks_in`.

    Raises:
        UsageError: if the model, the text or a task is not what it should be.
    """
    from secateur.evaluators.perplexity import evaluate_model

    try:
        return evaluate_model(
            model,
            text=text,
            part=part,
            n_tokens=n_tokens,
            window=window,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            tasks=tasks,
            say=say,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def tasks_in(names: Sequence[str], directory: Path | None, samples: int | None) -> TaskPlan | None:
    """The tasks with these names; None if there are none.

    Args:
        names: of tasks.
        directory: of their files, YAML as lm-eval reads them, with their data beside them.
        samples: of each task; None for all.

    Raises:
        UsageError: if there are tasks without a directory, or the number of samples is out of range.
    """
    from secateur.evaluators.tasks.plan import TaskPlan

    if samples is not None and samples < 1:
        raise UsageError(f"Expected `--samples` >= 1, got {samples}.")
    if names and directory is None:
        raise UsageError(f"Expected `--task-dir` with the files of {', '.join(names)}, got nothing.")
    return TaskPlan(tuple(names), directory, samples) if names and directory else None
