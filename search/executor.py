"""The extension point `Executor`: runs evaluations in this process or on workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from secateur.spaces.measurement import Fidelity, Measurement


class Evaluates(Protocol):
    """Evaluator in a worker: built once, then given batches of candidates as text."""

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """One measurement a candidate, in order."""
        ...


class Setup(Protocol):
    """Function that builds a worker's evaluator; it can be pickled where workers are other processes."""

    @property
    def directories(self) -> Sequence[Path]:
        """Directories it reads; a worker on another node receives copies."""
        ...

    def __call__(self, directories: Sequence[Path]) -> Evaluates:
        """Build the evaluator, given the paths of the directories on the worker's node."""
        ...


@dataclass(frozen=True)
class Job:
    """Batch for one worker: distinct candidates (canonical texts) at one fidelity."""

    number: int
    candidates: tuple[str, ...]
    fidelity: Fidelity


@dataclass(frozen=True)
class WorkerStatus:
    """State of the workers.

    Args:
        workers: ready ones.
        busy: ready ones with a job.
        lost: workers that died, hung or ran out of memory so far, and were replaced.
        troubles: one line for each of the last few lost workers.
    """

    workers: int
    busy: int
    lost: int = 0
    troubles: tuple[str, ...] = ()


class ExecutorError(RuntimeError):
    """Loss of all workers, e.g. with the cluster. The same command continues the study."""


class Executor(ABC):
    """Runs jobs and returns their measurements, in any process or on any machine.

    A candidate that crashes its worker is returned as infeasible, with the reason. A context manager; its end stops
    the workers.
    """

    @property
    @abstractmethod
    def n_free(self) -> int:
        """Number of jobs it can accept now."""

    @property
    @abstractmethod
    def n_pending(self) -> int:
        """Number of jobs submitted and not yet returned."""

    @property
    @abstractmethod
    def job_size(self) -> int:
        """Number of candidates a job should have at present (> 0)."""

    @property
    @abstractmethod
    def worker_status(self) -> WorkerStatus:
        """State of the workers, for display."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Accept a job; returns at once.

        Raises:
            RuntimeError: if there is no free place.
        """

    @abstractmethod
    def wait(self) -> list[tuple[Job, list[Measurement]]]:
        """Finished jobs with their measurements; blocks until there is one, or briefly while no worker is ready.

        Raises:
            RuntimeError: if nothing is pending.
            ExecutorError: if no worker can be started any more.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the workers; pending jobs are dropped. May be called twice."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def measure_all(
    executor: Executor, candidates: Sequence[str], fidelity: Fidelity, size: int
) -> Iterator[list[Measurement]]:
    """Measurements of distinct candidates, outside a search, in the order of their arrival; `size` candidates a job.

    The executor has no pending jobs.
    """
    parts = [tuple(candidates[i : i + size]) for i in range(0, len(candidates), size)]
    jobs = deque(Job(number, part, fidelity) for number, part in enumerate(parts))
    while jobs or executor.n_pending:
        while jobs and executor.n_free:
            executor.submit(jobs.popleft())
        yield [measurement for _, found in executor.wait() for measurement in found]
