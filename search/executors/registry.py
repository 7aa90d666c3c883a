"""The executors by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from secateur.search.executor import Evaluates, Executor
from secateur.search.executors.local import LocalExecutor, LocalSettings


@dataclass(frozen=True)
class ExecutorRow:
    """One executor.

    Args:
        settings: model of its section in the settings; has `kind` and `batch` (candidates a job).
        build: the executor from its settings and from what sets up an evaluator in a worker.
        summary: one line for listings.
    """

    settings: type[BaseModel]
    build: Callable[[Any, Callable[[], Evaluates]], Executor]
    summary: str


def _build_local(_settings: LocalSettings, make_evaluator: Callable[[], Evaluates]) -> Executor:
    return LocalExecutor(make_evaluator)


EXECUTORS: dict[str, ExecutorRow] = {
    "local": ExecutorRow(
        settings=LocalSettings,
        build=_build_local,
        summary="in this process, one job at a time",
    ),
}
