"""The extension point `Executor`: who runs evaluations, and where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from secateur.spaces.measurement import Fidelity, Measurement


class Evaluates(Protocol):
    """What a worker holds: set up once, kept for its life, given batches of candidates as text."""

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """One measurement a candidate, in order."""
        ...


@dataclass(frozen=True)
class Job:
    """A batch for one worker: distinct candidates (canonical texts) at one fidelity."""

    number: int
    candidates: tuple[str, ...]
    fidelity: Fidelity


class Executor(ABC):
    """Runs jobs and hands back their measurements; nothing outside it may assume a process.

    Used as a context manager; leaving it ends its workers.
    """

    @property
    @abstractmethod
    def n_free(self) -> int:
        """How many more jobs it takes now."""

    @property
    @abstractmethod
    def n_pending(self) -> int:
        """How many jobs were submitted and not yet handed back."""

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
