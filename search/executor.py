"""The extension point `Executor`: who runs evaluations, and where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from secateur.spaces.measurement import Fidelity, Measurement


class Evaluates(Protocol):
    """What a worker holds: set up once, kept for its life, given batches of candidates as text."""

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """One measurement a candidate, in order."""
        ...


class Setup(Protocol):
    """How a worker is set up. A plain value that can be pickled where workers are other processes."""

    @property
    def directories(self) -> Sequence[Path]:
        """What it reads; a worker on another node is given copies."""
        ...

    def __call__(self, directories: Sequence[Path]) -> Evaluates:
        """Set up a worker, with the directories as they are called where it runs."""
        ...


@dataclass(frozen=True)
class Job:
    """A batch for one worker: distinct candidates (canonical texts) at one fidelity."""

    number: int
    candidates: tuple[str, ...]
    fidelity: Fidelity


@dataclass(frozen=True)
class Staff:
    """How the workers are.

    Args:
        workers: ready to work.
        busy: of them, with something to do.
        lost: workers that died, hung or ran out of memory so far, and were replaced.
        troubles: for each of the last few of these, one line.
    """

    workers: int
    busy: int
    lost: int = 0
    troubles: tuple[str, ...] = ()


class ExecutorError(RuntimeError):
    """Nothing can be run any more, e.g. since the cluster is gone. The study continues with the same command."""


class Executor(ABC):
    """Runs jobs and hands back their measurements; nothing outside it may assume a process.

    A candidate that can't be measured because it takes its worker with it comes back infeasible, with the
    reason. Used as a context manager; leaving it ends its workers.
    """

    @property
    @abstractmethod
    def n_free(self) -> int:
        """How many more jobs it takes now."""

    @property
    @abstractmethod
    def n_pending(self) -> int:
        """How many jobs were submitted and not yet handed back."""

    @property
    @abstractmethod
    def job_size(self) -> int:
        """How many candidates a job should have at present (> 0)."""

    @property
    @abstractmethod
    def staff(self) -> Staff:
        """How the workers are, for people."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Take a job; returns at once.

        Raises:
            RuntimeError: if there is no free place.
        """

    @abstractmethod
    def wait(self) -> list[tuple[Job, list[Measurement]]]:
        """Block until at least one job is done; the finished jobs.

        Raises:
            RuntimeError: if nothing is pending.
            ExecutorError: if nothing can be run any more.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers; pending jobs are dropped. May be called twice."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def measure_all(
    executor: Executor, candidates: Sequence[str], fidelity: Fidelity, size: int
) -> Iterator[list[Measurement]]:
    """Have candidates measured at one fidelity, outside a search; the measurements as they come.

    Args:
        executor: with nothing pending.
        candidates: distinct texts.
        fidelity: of the measurements.
        size: candidates a job.
    """
    parts = [tuple(candidates[i : i + size]) for i in range(0, len(candidates), size)]
    jobs = deque(Job(number, part, fidelity) for number, part in enumerate(parts))
    while jobs or executor.n_pending:
        while jobs and executor.n_free:
            executor.submit(jobs.popleft())
        yield [measurement for _, found in executor.wait() for measurement in found]
