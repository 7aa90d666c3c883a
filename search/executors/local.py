"""The executor without processes: for tests, laptops and one GPU."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.search.executor import Evaluates, Executor, Job, Setup, Staff
from secateur.spaces.measurement import Measurement


class LocalSettings(BaseModel):
    """Settings of the local executor.

    Args:
        threads: threads that the evaluator computes with; None leaves that to the numerical library.
        batch: candidates a job. More of them share more, and a stopped search waits for one job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local"] = "local"
    threads: int | None = Field(default=None, gt=0)
    batch: int = Field(default=16, gt=0)

    @property
    def deterministic(self) -> bool:
        """One job at a time, always in the same order."""
        return True


class LocalExecutor(Executor):
    """Evaluates in this process, one job at a time, while the driver waits.

    An exception of the evaluator leaves `wait` as it is; the job is then no longer pending.

    Args:
        settings: see there.
        setup: called once, when the first job is run.
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
    def staff(self) -> Staff:
        return Staff(workers=1, busy=self.n_pending)

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
