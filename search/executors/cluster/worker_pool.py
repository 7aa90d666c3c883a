"""The workers: started, given calls, watched, replaced."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.search.executor import ExecutorError, Setup, Staff
from secateur.search.executors.cluster.lazy_ray import load_ray
from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.executors.cluster.staging import Folder
from secateur.search.executors.cluster.worker import OutOfMemoryError, Worker
from secateur.spaces.measurement import Fidelity, Measurement

IN_FLIGHT = 2
"""Calls that a worker is given: the next one is there when it has finished one."""

START_S = 300.0
"""Longest time without any worker that is ready."""

N_TROUBLES = 5


@dataclass
class Call:
    """Some candidates of a job, in one worker's hands.

    Args:
        job: number of the job.
        candidates: texts, in order.
        fidelity: of the measurements.
        failures: how many workers were lost on it.
    """

    job: int
    candidates: tuple[str, ...]
    fidelity: Fidelity
    failures: int = 0


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it."""

    actor: Any
    setting_up: Any  # reference to what `set_up` returns
    since: float  # when it was started, or began what it does
    name: str | None = None  # once it is ready
    calls: deque[tuple[Any, Call]] = field(default_factory=deque)  # references; the first one is running
    known: set[str] = field(default_factory=set)  # candidates that it has measured

    @property
    def reference(self) -> Any:
        """What it will be done with next, if anything."""
        if self.name is None:
            return self.setting_up
        return self.calls[0][0] if self.calls else None

    def takes(self, call: Call) -> bool:
        """Whether it may be given the call now.

        A call that a worker was lost on shares none with another: a worker that ends at once takes the answer to the
        call before with it, which would be blamed in turn.
        """
        if self.name is None:
            return False
        suspect = call.failures > 0 or any(other.failures > 0 for _, other in self.calls)
        return len(self.calls) < (1 if suspect else IN_FLIGHT)


@dataclass(frozen=True)
class Done:
    """A call with its measurements."""

    call: Call
    measurements: list[Measurement]


@dataclass(frozen=True)
class Lost:
    """A call whose worker was lost while it ran, and why."""

    call: Call
    reason: str


@dataclass(frozen=True)
class Raised:
    """A call that the evaluator ended with an exception of its own."""

    call: Call
    error: BaseException


Ended = Done | Lost | Raised


class Crew:
    """A fixed number of workers. One that is lost is replaced at once.

    Args:
        settings: of the executor.
        n_workers: how many.
        setup: of a worker.
        folders: its directories.
        depot: see `Worker`.
    """

    def __init__(
        self,
        settings: RaySettings,
        n_workers: int,
        setup: Setup,
        folders: Sequence[Folder],
        depot: Any,
    ) -> None:
        ray = load_ray()

        self._ray = ray
        self._settings = settings
        self._arguments = (ray.put(setup), list(folders), depot)
        self._actor = ray.remote(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
        )(Worker)
        self._n_lost = 0
        self._n_stillborn = 0  # lost in a row before they were ready
        self._troubles: deque[str] = deque(maxlen=N_TROUBLES)
        self._last_ready = time.monotonic()
        self._members = [self._start() for _ in range(n_workers)]

    @property
    def staff(self) -> Staff:
        """How they are."""
        ready = [member for member in self._members if member.name is not None]
        busy = sum(1 for member in ready if member.calls)
        return Staff(len(ready), busy, self._n_lost, tuple(self._troubles))

    def give(self, waiting: deque[Call]) -> None:
        """Hand out calls from the left to those who have least to do, with ties to those who know the candidates."""
        while waiting:
            able = [m for m in self._members if m.takes(waiting[0])]
            if not able:
                return
            call = waiting.popleft()
            texts = set(call.candidates)
            member = min(able, key=lambda m: (len(m.calls), -len(texts & m.known)))
            if not member.calls:
                member.since = time.monotonic()
            reference = member.actor.evaluate.remote(call.candidates, call.fidelity)
            member.calls.append((reference, call))
            member.known |= texts

    def collect(self, timeout_s: float, put_back: Callable[[Call], None]) -> list[Ended]:
        """What has come to an end, after waiting for the first at most so long.

        Args:
            timeout_s: in seconds.
            put_back: given the calls of a lost worker that it had not begun.

        Raises:
            ExecutorError: if workers can't be started.
            Exception: whatever a setup raised.
        """
        by_reference = {m.reference: m for m in self._members if m.reference is not None}
        references = list(by_reference)
        ready, _ = self._ray.wait(references, timeout=timeout_s)
        if ready:
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        ended: list[Ended] = []
        for reference in ready:
            ended += self._look(by_reference[reference], reference, put_back)
        ended += self._end_hung(put_back)
        self._check_alive()
        return ended

    def close(self) -> None:
        """End all of them."""
        for member in self._members:
            self._ray.kill(member.actor, no_restart=True)
        self._members = []

    def _start(self) -> _Member:
        actor = self._actor.remote(*self._arguments)
        return _Member(actor, actor.set_up.remote(), time.monotonic())

    def _look(self, member: _Member, reference: Any, put_back: Callable[[Call], None]) -> list[Ended]:
        """Take what a worker is done with."""
        exceptions = self._ray.exceptions
        try:
            result = self._ray.get(reference)
        except (exceptions.RayActorError, exceptions.NodeDiedError, exceptions.ObjectLostError) as error:
            return self._lose(member, _cause(error), put_back)
        except OutOfMemoryError as error:
            return self._lose(member, f"ran out of memory ({_unwrapped(error)})", put_back)
        except exceptions.RayTaskError as error:
            if member.name is None:  # its setup: the next one would fail alike
                raise _unwrapped(error) from error
            member.since = time.monotonic()
            return [Raised(member.calls.popleft()[1], _unwrapped(error))]
        self._last_ready = member.since = time.monotonic()
        if member.name is None:
            member.name = result
            self._n_stillborn = 0
            return []
        _, call = member.calls.popleft()
        return [Done(call, result)]

    def _end_hung(self, put_back: Callable[[Call], None]) -> list[Ended]:
        limit = self._settings.timeout_s
        ended: list[Ended] = []
        for member in list(self._members):
            if limit is not None and member.calls and time.monotonic() - member.since > limit:
                ended += self._lose(member, f"took longer than {limit:g} s", put_back)
        return ended

    def _lose(self, member: _Member, reason: str, put_back: Callable[[Call], None]) -> list[Ended]:
        """Replace a worker; the call that it ran is lost, the ones behind it go back."""
        self._ray.kill(member.actor, no_restart=True)
        self._n_lost += 1
        if member.name is None:
            self._n_stillborn += 1
            if self._n_stillborn > max(self._settings.attempts, len(self._members)):
                raise ExecutorError(
                    f"Expected workers to start, got {self._n_stillborn} in a row that were lost while they were set "
                    f"up: the last one {reason}."
                )
        self._troubles.append(f"worker {member.name or '(starting)'} {reason}")
        calls = [call for _, call in member.calls]
        for call in reversed(calls[1:]):
            put_back(call)
        self._members[self._members.index(member)] = self._start()
        return [Lost(call, reason) for call in calls[:1]]

    def _check_alive(self) -> None:
        if any(member.name is not None for member in self._members):
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > START_S:
            have = {
                name: round(n, 2)
                for name, n in self._ray.available_resources().items()
                if name in {"CPU", "GPU"}
            }
            raise ExecutorError(
                f"Expected a worker to be ready within {START_S:g} s, got none; each takes "
                f"{self._settings.cpus_per_worker:g} CPUs and {self._settings.gpus_per_worker:g} GPUs, free are {have}."
            )


def _cause(error: BaseException) -> str:
    """Why an actor died, in a few words."""
    text = str(error)
    if "running low on memory" in text:
        return "ran out of memory and was killed by Ray"
    return "died with its node" if "node has died" in text or "node died" in text else "died"


def _unwrapped(error: Any) -> BaseException:
    """What was raised in the worker."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else RuntimeError(str(error))
