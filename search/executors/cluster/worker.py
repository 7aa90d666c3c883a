"""Ray actor of a worker: one setup, then measurements; memory settings of its process."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.search.errors import ran_out_of_memory
from secateur.search.executor import Evaluates, Setup
from secateur.search.executors.cluster.staging import Folder, local_copy
from secateur.spaces.measurement import Fidelity, Measurement

TRIM_SECONDS = 5.0
"""Shortest time between two trims of freed memory: the system has to map trimmed pages again."""

KEPT_BYTES = 2**27
"""Freed memory kept at the end of the heap. By default the C library returns it at once, and the system maps and clears
the same pages again for each candidate."""

MAPPED_BYTES = 2**25
"""Smallest allocation with a mapping of its own, which is returned to the system when freed."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's constants


class OutOfMemoryError(RuntimeError):
    """Too little memory in the worker for a candidate."""


class Worker:
    """Worker, run as a Ray actor by the executor.

    Args:
        setup: makes the evaluator.
        folders: the setup's directories on the driver's node.
        file_server: actor to copy them from; None where they are on this node.
    """

    def __init__(self, setup: Setup, folders: Sequence[Folder], file_server: Any) -> None:
        self._setup = setup
        self._folders = folders
        self._file_server = file_server
        self._evaluator: Evaluates | None = None
        self._trimmed = time.monotonic()
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def set_up(self) -> str:
        """Build the evaluator. Returns the worker's name."""
        keep_memory()
        directories = [local_copy(folder, self._file_server) for folder in self._folders]
        self._evaluator = self._setup([Path(directory) for directory in directories])
        return self._name

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """One measurement a candidate, in order.

        Raises:
            OutOfMemoryError: if memory ran out; the worker is then replaced.
        """
        assert self._evaluator is not None  # `set_up` was called first
        try:
            measured = self._evaluator.evaluate(candidates, fidelity)
        except Exception as error:
            if ran_out_of_memory(error):
                raise OutOfMemoryError(str(error).partition("\n")[0]) from None
            raise
        if time.monotonic() - self._trimmed > TRIM_SECONDS:
            give_back_memory()
            self._trimmed = time.monotonic()
        return [replace(measurement, worker=self._name) for measurement in measured]


def keep_memory() -> None:
    """Keep freed memory for the next candidate; no effect with C libraries other than glibc."""
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_memory() -> None:
    """Return freed memory to the system: the workers of a node share it."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
