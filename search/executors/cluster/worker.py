"""What runs in a worker's process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.search.executor import Evaluates, Setup
from secateur.search.executors.cluster.process_memory import give_back_memory, keep_memory
from secateur.search.executors.cluster.staging import Folder, local_copy
from secateur.spaces.measurement import Fidelity, Measurement

TRIM_SECONDS = 5.0
"""Freed memory goes back to the system at most so often: pages that are used again have to be made again."""


class OutOfMemoryError(RuntimeError):
    """A candidate needs more memory than the worker has."""


class Worker:
    """Made a Ray actor by the executor: sets itself up once, then measures.

    Args:
        setup: what it becomes.
        folders: the setup's directories, as they are on the driver's node.
        depot: the actor to copy them from; None where they are in place.
    """

    def __init__(self, setup: Setup, folders: Sequence[Folder], depot: Any) -> None:
        self._setup = setup
        self._folders = folders
        self._depot = depot
        self._evaluator: Evaluates | None = None
        self._trimmed = time.monotonic()
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def set_up(self) -> str:
        """Get ready; the worker's name."""
        keep_memory()
        directories = [local_copy(folder, self._depot) for folder in self._folders]
        self._evaluator = self._setup([Path(directory) for directory in directories])
        return self._name

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """One measurement a candidate, in order.

        Raises:
            OutOfMemoryError: the process is of no use any more then.
        """
        assert self._evaluator is not None  # calls come in order
        try:
            measured = self._evaluator.evaluate(candidates, fidelity)
        except Exception as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
                raise OutOfMemoryError(str(error).partition("\n")[0]) from None
            raise
        if time.monotonic() - self._trimmed > TRIM_SECONDS:
            give_back_memory()
            self._trimmed = time.monotonic()
        return [replace(measurement, worker=self._name) for measurement in measured]
