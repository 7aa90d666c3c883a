"""What controllers share that work in batches: propose some, wait for all of them, go on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence

from secateur.search.controller import Proposal, Trial
from secateur.spaces.measurement import Fidelity, Measurement

Losses = list[float]
"""One value a proposal of the batch, in its order; infinite if the candidate is infeasible."""

Course = Generator[list[Proposal], Losses, None]
"""A search as a generator: yields a batch of proposals, receives their losses, ends when it has finished."""


class Batches:
    """Runs a course for a controller: hands its batches out bit by bit and collects the results in any order.

    Keeps the batch under way and nothing else, so that asking costs the same however many trials were told.

    Args:
        course: the search.
        objective: name of the value to minimise.
    """

    def __init__(self, course: Course, objective: str) -> None:
        self._course = course
        self._objective = objective
        self._started = False
        self._batch: list[Proposal] = []
        self._queue: deque[Proposal] = deque()
        self._losses: dict[tuple[str, str], float] = {}
        self._missing: set[tuple[str, str]] = set()

    def ask(self, n: int) -> list[Proposal]:
        """At most `n` proposals of the batch under way; none while its results are missing, or at the end."""
        while not self._missing:
            try:
                self._next_batch()
            except StopIteration:
                return []
        return [self._queue.popleft() for _ in range(min(n, len(self._queue)))]

    def tell(self, trials: Iterable[Trial]) -> None:
        """Note the results that belong to the batch under way."""
        for trial in trials:
            key = trial.measurement.key
            if key in self._missing:
                self._missing.discard(key)
                self._losses[key] = loss_of(trial.measurement, self._objective)

    def _next_batch(self) -> None:
        losses = [self._losses[proposal.key] for proposal in self._batch]
        self._batch = self._course.send(losses) if self._started else next(self._course)
        self._started = True
        self._losses = {}
        unique = {proposal.key: proposal for proposal in self._batch}
        self._missing = set(unique)
        self._queue = deque(unique.values())


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
