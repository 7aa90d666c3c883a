"""The executors by name.

A new one is a new file and a row here, or an entry point of the group ``secateur.executors``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from secateur.search.executor import Executor, Setup
from secateur.search.executors.cluster.building import Builds, build_by_workers
from secateur.search.executors.cluster.connection import reached
from secateur.search.executors.cluster.executor import RayExecutor
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.local import LocalExecutor, LocalSettings
from secateur.spaces.plugins import Registry, Row


@dataclass(frozen=True)
class ExecutorRow(Row):
    """One executor.

    Args:
        settings: model of its section in the settings; has `kind`, `batch` (candidates a round) and
            `deterministic`.
        build: the executor, from its settings and the workers' setup.
        reached: context with a connection to the workers, from the settings and the objects to send to them; entered
            first of all. Raises a UsageError.
        summary: one line for listings.
        build_by_workers: builds files of one directory by the workers, from the settings, a `Builds` and a callback
            with the number of files that are there; None: the driver builds them.
        in_process: whether the only worker is the driver itself.
        source: address of its description.
    """

    settings: type[BaseModel]
    build: Callable[[Any, Setup], Executor]
    reached: Callable[[Any, Any], AbstractContextManager[None]]
    summary: str
    build_by_workers: Callable[[Any, Builds, Callable[[int], None]], None] | None = None
    in_process: bool = False
    source: str = ""


EXECUTORS: Registry[ExecutorRow] = Registry(
    "secateur.executors",
    ExecutorRow,
    {
        "local": ExecutorRow(
            LocalSettings,
            LocalExecutor,
            lambda settings, payload: nullcontext(),
            "in this process, one job at a time",
            in_process=True,
        ),
        "ray": ExecutorRow(
            RaySettings,
            RayExecutor,
            reached,
            "Ray actors on this machine or on a cluster",
            build_by_workers=build_by_workers,
        ),
    },
)
