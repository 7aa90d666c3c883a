"""What controllers share that work in batches: propose some, wait for all of them, go on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence

from secateur.search.controller import Proposal, Trial
from secateur.spaces.measurement import Fidelity, Measurement

Key = tuple[str, str]

Losses = list[float]
"""One value a proposal of the batch, in its order; infinite if the candidate is infeasible."""

Course = Generator[list[Proposal], Losses, None]
"""A search as a generator: yields a batch of proposals, receives their losses, ends when it has finished."""


class Batches:
    """Runs courses for a controller: hands their batches out bit by bit and collects the results in any order.

    Several courses may be open: where one waits for results, another has something to propose. Keeps the
    batches under way and nothing else, so that asking costs the same however many trials were told.

    Args:
        objective: name of the value to minimise.
        courses: to begin with.
    """

    def __init__(self, objective: str, *courses: Course) -> None:
        self._objective = objective
        self._waiting: dict[Key, list[_Batch]] = {}
        self._ready: deque[_Batch] = deque()  # has something to propose, or may go on to the next batch
        self.n_open = 0  # courses that have not finished
        for course in courses:
            self.open(course)

    def open(self, course: Course) -> None:
        """Begin another course, after those that are open."""
        self._ready.append(_Batch(course))
        self.n_open += 1

    def ask(self, n: int) -> list[Proposal]:
        """At most `n` proposals, of the courses in order; none while all wait for results or have finished."""
        proposals: list[Proposal] = []
        while self._ready and len(proposals) < n:
            batch = self._ready[0]
            if batch.complete:
                self._advance(batch)
                continue
            proposals += [batch.queue.popleft() for _ in range(min(n - len(proposals), len(batch.queue)))]
            if not batch.queue:
                self._ready.popleft()
        return proposals

    def tell(self, trials: Iterable[Trial]) -> None:
        """Note the results that belong to batches under way."""
        for trial in trials:
            key = trial.measurement.key
            for batch in self._waiting.pop(key, ()):
                batch.missing.discard(key)
                batch.losses[key] = loss_of(trial.measurement, self._objective)
                if not batch.missing and batch not in self._ready:
                    self._ready.append(batch)

    def _advance(self, batch: _Batch) -> None:
        """Go on to the course's next batch, or close the course."""
        if not batch.go_on():
            self._ready.remove(batch)
            self.n_open -= 1
        for key in batch.missing:
            self._waiting.setdefault(key, []).append(batch)


class _Batch:
    """What one course waits for."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._started = False
        self._proposals: list[Proposal] = []
        self.queue: deque[Proposal] = deque()
        self.losses: dict[Key, float] = {}
        self.missing: set[Key] = set()

    @property
    def complete(self) -> bool:
        """Whether all results are there."""
        return not self.missing

    def go_on(self) -> bool:
        """Take the next batch of the course; False if there is none."""
        losses = [self.losses[proposal.key] for proposal in self._proposals]
        try:
            self._proposals = self._course.send(losses) if self._started else next(self._course)
        except StopIteration:
            return False
        self._started = True
        self.losses = {}
        unique = {proposal.key: proposal for proposal in self._proposals}
        self.missing = set(unique)
        self.queue = deque(unique.values())
        return True


def loss_of(measurement: Measurement, objective: str) -> float:
    """The value to minimise; infinite if the candidate is infeasible.

    Raises:
        ValueError: if the measurement has no such value.
    """
    if measurement.infeasible is not None:
        return math.inf
    if objective not in measurement.values:
        raise ValueError(
            f"Expected `objective` to be one of {', '.join(measurement.values)}, got {objective!r}."
        )
    return measurement.values[objective]


def check_fidelities(fidelities: Sequence[Fidelity]) -> tuple[Fidelity, ...]:
    """The fidelities, if there are any, all of the part ``search``, ascending.

    Raises:
        ValueError: if not.
    """
    if not fidelities or any(f.part != "search" for f in fidelities):
        texts = [fidelity.text for fidelity in fidelities]
        raise ValueError(f"Expected `fidelities` of the part search, at least one, got {texts}.")
    if list(fidelities) != sorted(set(fidelities)):
        tokens = [fidelity.n_tokens for fidelity in fidelities]
        raise ValueError(f"Expected `fidelities` to be strictly ascending, got {tokens}.")
    return tuple(fidelities)


def fidelity_of(fidelities: Sequence[Fidelity], n_tokens: int | None) -> Fidelity:
    """The fidelity with this number of tokens; the smallest if None.

    Raises:
        ValueError: if there is none, or the fidelities are out of order.
    """
    found = [f for f in check_fidelities(fidelities) if n_tokens in {None, f.n_tokens}]
    if not found:
        known = ", ".join(str(fidelity.n_tokens) for fidelity in fidelities)
        raise ValueError(
            f"Expected `n_tokens` of the controller to be one of the fidelities ({known}), got {n_tokens}."
        )
    return found[0]
