"""The executor `local`, in the driver's process: for tests, laptops and one GPU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.search.executor import Evaluates, Executor, Job, Setup, WorkerStatus
from secateur.spaces.measurement import Measurement
from secateur.spaces.section import Section


class LocalSettings(Section):
    """Settings of the executor `local`.

    Args:
        threads: compute threads of the evaluator; None: the default of the numerical library.
        batch: candidates a job. Larger jobs share more computation, but a stopped search waits for the job's end.
    """

    kind: Literal["local"] = "local"
    threads: int | None = Field(default=None, gt=0)
    batch: int = Field(default=16, gt=0)

    @property
    def deterministic(self) -> bool:
        """Always: one job at a time, in order."""
        return True


class LocalExecutor(Executor):
    """Executor in the driver's process, one job at a time.

    `wait` raises an exception of the evaluator unchanged; the job is then no longer pending. The setup is called once,
    at the first job.
    """

    def __init__(self, settings: LocalSettings, setup: Setup) -> None:
        self._settings = settings
        self._setup = setup
        self._evaluator: Evaluates | None = None
        self._job: Job | None = None

    @property
    def n_free(self) -> int:
        return 1 - self.n_pending

    @property
    def n_pending(self) -> int:
        return 0 if self._job is None else 1

    @property
    def job_size(self) -> int:
        return self._settings.batch

    @property
    def worker_status(self) -> WorkerStatus:
        return WorkerStatus(workers=1, busy=self.n_pending)

    def submit(self, job: Job) -> None:
        if self._job is not None:
            raise RuntimeError(f"Expected a free place for job {job.number}, got none. Call `wait` first.")
        self._job = job

    def wait(self) -> list[tuple[Job, list[Measurement]]]:
        if self._job is None:
            raise RuntimeError("Expected a pending job to wait for, got none. Call `submit` first.")
        job, self._job = self._job, None
        if self._evaluator is None:
            self._evaluator = self._setup(self._setup.directories)
        return [(job, self._evaluator.evaluate(job.candidates, job.fidelity))]

    def close(self) -> None:
        self._job = None
        self._evaluator = None
