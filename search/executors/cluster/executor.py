"""The executor `ray`: jobs in, measurements out, whatever happens to the workers."""

from __future__ import annotations

import math
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.search.executor import Executor, Job, Setup, Staff
from secateur.search.executors.cluster.connection import Connection, check_pickles, connect, disconnect
from secateur.search.executors.cluster.lazy_ray import load_ray
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.staging import Depot, Folder, describe
from secateur.search.executors.cluster.watchdog import REMEDY, ClusterLostError, Watchdog, places
from secateur.search.executors.cluster.worker_pool import IN_FLIGHT, Call, Crew, Done, Ended, Raised
from secateur.spaces.measurement import Measurement

CALL_S = 0.1
"""Shorter calls cost more on the way than they are worth: see experiments/002-scale."""

POLL_S = 1.0
MAX_JOB = 512


@dataclass
class _Open:
    """A job whose measurements come in one by one."""

    job: Job
    found: dict[str, Measurement]


class RayExecutor(Executor):
    """Workers as Ray actors.

    Each worker has two calls in flight. One that dies, hangs or runs out of memory is replaced; the candidates of the
    call that it ran are tried again one by one, so that a deadly one takes no others with it, and after so many
    attempts count as infeasible.

    Args:
        settings: see there.
        setup: of a worker; pickled.

    Raises:
        UsageError: if the cluster is not as it should be, or the setup can't be pickled.
    """

    def __init__(self, settings: RaySettings, setup: Setup) -> None:
        self._settings = settings
        self._connection = connect(settings)
        try:
            check_pickles(setup)
            self._crew, self._depot = _hire(settings, self._connection, setup)
            self._watchdog = Watchdog(places(), _complain)
        except BaseException:
            disconnect(self._connection)
            raise
        self._open: dict[int, _Open] = {}
        self._complete: list[int] = []  # numbers of those of them that are to be handed back
        self._waiting: deque[Call] = deque()
        self._seconds: float | None = None  # a candidate takes
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
    def staff(self) -> Staff:
        return self._crew.staff

    def submit(self, job: Job) -> None:
        if not self.n_free:
            raise RuntimeError(f"Expected a free place for job {job.number}, got none. Call `wait` first.")
        self._open[job.number] = _Open(job, {})
        self._waiting.append(Call(job.number, job.candidates, job.fidelity))
        self._crew.give(self._waiting)

    def wait(self) -> list[tuple[Job, list[Measurement]]]:
        if not self._open:
            raise RuntimeError("Expected a pending job to wait for, got none. Call `submit` first.")
        while True:
            if self._complete:
                return self._hand_back()
            if self._watchdog.lost is not None:
                self._watchdog.noted = True
                raise ClusterLostError(
                    f"Expected the Ray cluster to stay, but {self._watchdog.lost}. {REMEDY}"
                )
            ended = self._crew.collect(POLL_S, self._waiting.appendleft)
            errors = [error for one in ended if (error := self._take(one)) is not None]
            self._crew.give(self._waiting)
            if errors:
                raise errors[0]

    def _hand_back(self) -> list[tuple[Job, list[Measurement]]]:
        """The jobs that are complete, which are no longer pending then."""
        jobs = [self._open.pop(number) for number in self._complete]
        self._complete.clear()
        return [(one.job, [one.found[text] for text in one.job.candidates]) for one in jobs]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._open.clear()
        self._complete.clear()
        self._waiting.clear()
        if self._watchdog.lost is not None:  # Ray's calls may hang; the watchdog ends the process if they do
            return
        self._watchdog.close()
        self._crew.close()
        if self._depot is not None:
            ray = load_ray()

            ray.kill(self._depot, no_restart=True)
        disconnect(self._connection)

    def _take(self, ended: Ended) -> BaseException | None:
        """Note what came of a call; what the evaluator raised, if it did. Its job is dropped then."""
        call = ended.call
        one = self._open.get(call.job)
        if one is None:  # dropped
            return None
        if isinstance(ended, Raised):
            del self._open[call.job]
            return ended.error
        if isinstance(ended, Done):
            self._note_speed(ended.measurements)
            self._add(one, ended.measurements)
            return None
        attempts, failures = self._settings.attempts, call.failures + 1
        together = len(call.candidates) > 1  # which of them it was is not known: each gets a chance alone
        for text in reversed(call.candidates):
            if together or failures < attempts:
                alone = Call(call.job, (text,), call.fidelity, min(failures, attempts - 1))
                self._waiting.appendleft(alone)
            else:
                times = f", {failures} times" if failures > 1 else ""
                reason = f"its worker {ended.reason}{times}"
                self._add(one, [Measurement(text, call.fidelity, infeasible=reason, worker="")])
        return None

    def _add(self, one: _Open, measurements: list[Measurement]) -> None:
        one.found |= {m.candidate: m for m in measurements}
        if len(one.found) == len(one.job.candidates):
            self._complete.append(one.job.number)

    def _note_speed(self, measured: list[Measurement]) -> None:
        times = [m.seconds for m in measured if m.seconds > 0]
        if times:
            mean = sum(times) / len(times)
            self._seconds = mean if self._seconds is None else 0.7 * self._seconds + 0.3 * mean


def _hire(settings: RaySettings, connection: Connection, setup: Setup) -> tuple[Crew, Any]:
    """The workers, and the depot where there may be nodes that need one."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray = load_ray()

    folders: list[Folder] = [describe(Path(directory)) for directory in setup.directories]
    depot = None
    if connection.joined and folders:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
        depot = ray.remote(**options)(Depot).remote(folders)
    return Crew(settings, connection.n_workers, setup, folders, depot), depot


def _complain(line: str) -> None:
    sys.stderr.write(f"secateur: error: {line}\n")
