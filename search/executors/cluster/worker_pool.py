"""Pool of workers as Ray actors: starts them, hands out calls, and replaces those that die or hang."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.search.executor import ExecutorError, Setup, WorkerStatus
from secateur.search.executors.cluster.lazy_ray import load_ray
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.staging import Folder
from secateur.search.executors.cluster.worker import OutOfMemoryError, Worker
from secateur.spaces.measurement import Fidelity, Measurement

IN_FLIGHT = 2
"""Calls a worker holds at a time: one that runs and one queued behind it."""

N_TROUBLES = 5


@dataclass
class Call:
    """Candidates of one job, assigned to one worker.

    Args:
        job: number of the job.
        candidates: canonical texts, in order.
        fidelity: of the measurements.
        failures: number of workers lost while running it.
    """

    job: int
    candidates: tuple[str, ...]
    fidelity: Fidelity
    failures: int = 0


Result = list[Measurement] | str | BaseException
"""Result of a call: its measurements, the reason why its worker was lost, or the evaluator's exception."""


@dataclass(eq=False)
class _PooledWorker:
    """The driver's record of one worker."""

    actor: Any
    setting_up: Any  # reference to the result of `set_up`
    since: float  # start of the worker, or of its current call
    name: str | None = None  # None until it is ready
    calls: deque[tuple[Any, Call]] = field(default_factory=deque)  # with their references; the first one runs
    known: set[str] = field(default_factory=set)  # candidates it has measured

    @property
    def reference(self) -> Any:
        """The result to wait for next, if any."""
        if self.name is None:
            return self.setting_up
        return self.calls[0][0] if self.calls else None

    def takes(self, call: Call) -> bool:
        """True if the worker can accept the call now.

        A call that has cost a worker runs alone on one: a worker that dies at once also loses the unsent result of the
        previous call, which would then be blamed.
        """
        if self.name is None:
            return False
        suspect = call.failures > 0 or any(other.failures > 0 for _, other in self.calls)
        return len(self.calls) < (1 if suspect else IN_FLIGHT)


class WorkerPool:
    """A fixed number of workers; a lost worker is replaced at once."""

    def __init__(
        self,
        settings: RaySettings,
        n_workers: int,
        setup: Setup,
        folders: Sequence[Folder],
        file_server: Any,
    ) -> None:
        self._ray = ray = load_ray()
        self._settings = settings
        self._arguments = (ray.put(setup), list(folders), file_server)
        self._actor = ray.remote(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
        )(Worker)
        self._n_lost = 0
        self._n_failed_starts = 0  # workers in a row lost during setup
        self._troubles: deque[str] = deque(maxlen=N_TROUBLES)
        self._last_ready = time.monotonic()
        self.waiting: deque[Call] = deque()  # calls without a worker
        self._workers = [self._start() for _ in range(n_workers)]

    @property
    def worker_status(self) -> WorkerStatus:
        """Number of ready, busy and lost workers, and the last failures."""
        ready = [worker for worker in self._workers if worker.name is not None]
        busy = sum(1 for worker in ready if worker.calls)
        return WorkerStatus(len(ready), busy, self._n_lost, tuple(self._troubles))

    def assign(self) -> None:
        """Assign waiting calls, in order, to the least loaded worker; ties go to the one that knows the candidates."""
        while self.waiting:
            able = [m for m in self._workers if m.takes(self.waiting[0])]
            if not able:
                return
            call = self.waiting.popleft()
            texts = set(call.candidates)
            worker = min(able, key=lambda m: (len(m.calls), -len(texts & m.known)))
            if not worker.calls:
                worker.since = time.monotonic()
            reference = worker.actor.evaluate.remote(call.candidates, call.fidelity)
            worker.calls.append((reference, call))
            worker.known |= texts

    def collect(self, timeout_s: float) -> list[tuple[Call, Result]]:
        """Calls that ended, after waiting at most `timeout_s` seconds for the first.

        Calls that a lost worker had not begun wait again, before the others.

        Raises:
            ExecutorError: if workers can't be started.
            Exception: any exception of a worker's setup.
        """
        by_reference = {m.reference: m for m in self._workers if m.reference is not None}
        references = list(by_reference)
        ready, _ = self._ray.wait(references, timeout=timeout_s)
        if ready:
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        ended = [call for reference in ready for call in self._result(by_reference[reference], reference)]
        ended += self._end_hung()
        self._check_alive()
        return ended

    def close(self) -> None:
        """Stop all workers."""
        for worker in self._workers:
            self._ray.kill(worker.actor, no_restart=True)
        self._workers = []

    def _start(self) -> _PooledWorker:
        actor = self._actor.remote(*self._arguments)
        return _PooledWorker(actor, actor.set_up.remote(), time.monotonic())

    def _result(self, worker: _PooledWorker, reference: Any) -> list[tuple[Call, Result]]:
        """The worker's current call with its result; none at the end of its setup."""
        exceptions = self._ray.exceptions
        try:
            result = self._ray.get(reference)
        except (exceptions.RayActorError, exceptions.NodeDiedError, exceptions.ObjectLostError) as error:
            return self._lose(worker, _cause(error))
        except OutOfMemoryError as error:
            return self._lose(worker, f"ran out of memory ({unwrapped(error)})")
        except exceptions.RayTaskError as error:
            if worker.name is None:  # setup failed: so would the next worker's
                raise unwrapped(error) from error
            worker.since = time.monotonic()
            return [(worker.calls.popleft()[1], unwrapped(error))]
        self._last_ready = worker.since = time.monotonic()
        if worker.name is None:
            worker.name = result
            self._n_failed_starts = 0
            return []
        return [(worker.calls.popleft()[1], result)]

    def _end_hung(self) -> list[tuple[Call, Result]]:
        limit = self._settings.timeout_s
        ended: list[tuple[Call, Result]] = []
        for worker in list(self._workers):
            if limit is not None and worker.calls and time.monotonic() - worker.since > limit:
                ended += self._lose(worker, f"took longer than {limit:g} s")
        return ended

    def _lose(self, worker: _PooledWorker, reason: str) -> list[tuple[Call, Result]]:
        """Replace a worker; the call it ran is lost, queued calls wait again."""
        self._ray.kill(worker.actor, no_restart=True)
        self._n_lost += 1
        if worker.name is None:
            self._n_failed_starts += 1
            if self._n_failed_starts > max(self._settings.attempts, len(self._workers)):
                raise ExecutorError(
                    f"Expected workers to start, got {self._n_failed_starts} in a row that were lost during setup: the "
                    f"last one {reason}."
                )
        self._troubles.append(f"worker {worker.name or '(starting)'} {reason}")
        calls = [call for _, call in worker.calls]
        self.waiting.extendleft(reversed(calls[1:]))
        self._workers[self._workers.index(worker)] = self._start()
        return [(call, reason) for call in calls[:1]]

    def _check_alive(self) -> None:
        if any(worker.name is not None for worker in self._workers):
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > self._settings.start_s:
            free = self._ray.available_resources().items()
            have = {name: round(n, 2) for name, n in free if name in {"CPU", "GPU"}}
            raise ExecutorError(
                f"Expected a worker to be ready within {self._settings.start_s:g} s (`executor.start_s`), got none; "
                f"each takes {self._settings.cpus_per_worker:g} CPUs and {self._settings.gpus_per_worker:g} GPUs, free "
                f"are {have}."
            )


def _cause(error: BaseException) -> str:
    """Cause of an actor's death, in a few words."""
    text = str(error)
    if "running low on memory" in text:
        return "ran out of memory and was killed by Ray"
    return "died with its node" if "node has died" in text or "node died" in text else "died"


def unwrapped(error: Any) -> BaseException:
    """The exception raised in the worker."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else RuntimeError(str(error))
