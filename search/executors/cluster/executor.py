"""The executor `ray`: jobs on Ray actors, with retries where workers are lost."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from secateur.search.executor import Executor, Job, Setup, WorkerStatus
from secateur.search.executors.cluster.connection import Connection, check_pickles, connect, disconnect
from secateur.search.executors.cluster.lazy_ray import load_ray
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.staging import FileServer, describe
from secateur.search.executors.cluster.survivor import Survivor
from secateur.search.executors.cluster.watchdog import REMEDY, SAFE, ClusterLostError, Watchdog, places
from secateur.search.executors.cluster.worker_pool import IN_FLIGHT, Call, Result, WorkerPool
from secateur.search.mirror.address import masked
from secateur.spaces.measurement import Measurement

CALL_S = 0.1
"""Shortest call worth its overhead: see experiments/002-scale."""

POLL_S = 1.0
MAX_JOB = 512


class RayExecutor(Executor):
    """Executor with workers as Ray actors.

    Each worker has two calls in flight. A worker that dies, hangs or runs out of memory is replaced; the candidates of
    its running call are retried one by one, so that a candidate that crashes workers affects no others, and count as
    infeasible after `attempts` failures. The setup is pickled.

    Raises:
        UsageError: if the cluster lacks resources or has other versions, or the setup can't be pickled.
    """

    def __init__(self, settings: RaySettings, setup: Setup) -> None:
        self._settings = settings
        self._connection = connect(settings)
        try:
            check_pickles(setup)
            self._pool, self._file_server = _start_pool(settings, self._connection, setup)
            found = places()
            self._survivor = Survivor(found, _advice())
            remedy = REMEDY if self._connection.joined else _advice()  # a Ray of our own starts again with it
            self._watchdog = Watchdog(found, self._complain, remedy=remedy)
        except BaseException:
            disconnect(self._connection)
            raise
        self._open: dict[int, tuple[Job, dict[str, Measurement]]] = {}  # with those received so far
        self._seconds: float | None = None  # a candidate, moving average
        self._closed = False

    @property
    def n_free(self) -> int:
        return max(0, self._n_places - len(self._open))

    @property
    def n_pending(self) -> int:
        return len(self._open)

    @property
    def _n_places(self) -> int:
        return IN_FLIGHT * self._connection.n_workers

    @property
    def job_size(self) -> int:
        fair = math.ceil(self._settings.batch / self._n_places)
        long_enough = math.ceil(CALL_S / self._seconds) if self._seconds else 1
        return min(max(fair, long_enough), MAX_JOB)

    @property
    def worker_status(self) -> WorkerStatus:
        return self._pool.worker_status

    def submit(self, job: Job) -> None:
        if not self.n_free:
            raise RuntimeError(f"Expected a free place for job {job.number}, got none. Call `wait` first.")
        self._open[job.number] = job, {}
        self._pool.waiting.append(Call(job.number, job.candidates, job.fidelity))
        self._pool.assign()

    def wait(self) -> list[tuple[Job, list[Measurement]]]:
        if not self._open:
            raise RuntimeError("Expected a pending job to wait for, got none. Call `submit` first.")
        while True:
            complete = [n for n, (job, found) in self._open.items() if len(found) == len(job.candidates)]
            if complete:
                jobs = [self._open.pop(number) for number in complete]
                return [(job, [found[text] for text in job.candidates]) for job, found in jobs]
            if self._watchdog.lost is not None:
                self._watchdog.noted = True
                raise ClusterLostError(
                    f"Expected the Ray cluster to keep running, but {self._watchdog.lost}. {self._watchdog.remedy}"
                )
            ended = self._pool.collect(POLL_S)
            errors = [error for one in ended if (error := self._take(*one)) is not None]
            self._pool.assign()
            if errors:
                raise errors[0]
            if not ended and not self._pool.worker_status.workers:
                return []  # so that a search can be stopped while workers start

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._open.clear()
        self._pool.waiting.clear()
        self._survivor.dismiss()
        if self._watchdog.lost is not None:  # Ray's calls may hang; the watchdog then ends the process
            return
        self._watchdog.close()
        self._pool.close()
        if self._file_server is not None:
            load_ray().kill(self._file_server, no_restart=True)
        disconnect(self._connection)

    def _complain(self, line: str) -> None:
        """Message of the watchdog, in place of the survivor."""
        self._survivor.dismiss()
        sys.stderr.write(f"secateur: error: {line}\n")

    def _take(self, call: Call, result: Result) -> BaseException | None:
        """Record the end of a call. Returns the evaluator's exception, if any; the job is dropped then."""
        if call.job not in self._open:  # dropped
            return None
        _, found = self._open[call.job]
        if isinstance(result, BaseException):
            del self._open[call.job]
            return result
        if isinstance(result, list):
            self._note_speed(result)
            found |= {m.candidate: m for m in result}
            return None
        attempts, failures = self._settings.attempts, call.failures + 1
        together = len(call.candidates) > 1  # the cause is unknown: each is retried alone
        for text in reversed(call.candidates):
            if together or failures < attempts:
                alone = Call(call.job, (text,), call.fidelity, min(failures, attempts - 1))
                self._pool.waiting.appendleft(alone)
            else:
                times = f", {failures} times" if failures > 1 else ""
                reason = f"its worker {result}{times}"
                found[text] = Measurement(text, call.fidelity, infeasible=reason, worker="")
        return None

    def _note_speed(self, measured: list[Measurement]) -> None:
        times = [m.seconds for m in measured if m.seconds > 0]
        if times:
            mean = sum(times) / len(times)
            self._seconds = mean if self._seconds is None else 0.7 * self._seconds + 0.3 * mean


def _start_pool(settings: RaySettings, connection: Connection, setup: Setup) -> tuple[WorkerPool, Any]:
    """The workers, and a file server where other nodes may need one."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray = load_ray()
    folders = [describe(Path(directory)) for directory in setup.directories]
    file_server = None
    if connection.joined and folders:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
        file_server = ray.remote(**options)(FileServer).remote(folders)
    return WorkerPool(settings, connection.n_workers, setup, folders, file_server), file_server


def _advice() -> str:
    """Advice for the driver's sudden end, with the command that continues."""
    program = "secateur" if Path(sys.argv[0]).name in ("secateur", "__main__.py") else f"python {sys.argv[0]}"
    command = masked(f"{program} {shlex.join(sys.argv[1:])}".strip())
    return f"{SAFE} Continue with: {command}"
