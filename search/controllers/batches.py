"""Search procedures: controllers written as generators that propose a batch and wait for its losses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence

from secateur.search.controller import Controller, Proposal, Trial
from secateur.spaces.measurement import Fidelity, Measurement

Key = tuple[str, str]

Losses = list[float]
"""One loss a proposal of the batch, in order; infinite if the candidate is infeasible."""

SearchProcedure = Generator[list[Proposal], Losses, None]
"""A search as a generator: yields a batch of proposals and receives their losses, until it has finished."""


class Batches:
    """Runs search procedures for a controller: proposes their batches in parts, collects results in any order.

    Several procedures may be open at a time: while one waits for results, another proposes. Only open batches are
    kept, so that the time of `ask` does not grow with the number of trials.

    Args:
        objective: name of the value to minimise.
        procedures: open from the beginning.
    """

    def __init__(self, objective: str, *procedures: SearchProcedure) -> None:
        self._objective = objective
        self._waiting: dict[Key, list[_Batch]] = {}
        self._ready: deque[_Batch] = deque()  # with proposals left, or complete
        self.n_open = 0  # unfinished procedures
        for procedure in procedures:
            self.open(procedure)

    def open(self, procedure: SearchProcedure) -> None:
        """Add a procedure, after the open ones."""
        self._ready.append(_Batch(procedure))
        self.n_open += 1

    def ask(self, n: int) -> list[Proposal]:
        """At most `n` proposals, of the procedures in order; none if all wait for results or have finished."""
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
        """Record the results of open batches."""
        for trial in trials:
            key = trial.measurement.key
            for batch in self._waiting.pop(key, ()):
                batch.missing.discard(key)
                batch.losses[key] = loss_of(trial.measurement, self._objective)
                if not batch.missing and batch not in self._ready:
                    self._ready.append(batch)

    def _advance(self, batch: _Batch) -> None:
        """Continue with the procedure's next batch, or close the procedure."""
        if not batch.go_on():
            self._ready.remove(batch)
            self.n_open -= 1
        for key in batch.missing:
            self._waiting.setdefault(key, []).append(batch)


class ProcedureController(Controller):
    """Controller of one search procedure."""

    def __init__(self, objective: str, procedure: SearchProcedure) -> None:
        self._batches = Batches(objective, procedure)

    def ask(self, n: int) -> list[Proposal]:
        return self._batches.ask(n)

    def tell(self, trials: Sequence[Trial]) -> None:
        self._batches.tell(trials)


class _Batch:
    """Present batch of one procedure."""

    def __init__(self, procedure: SearchProcedure) -> None:
        self._procedure = procedure
        self._started = False
        self._proposals: list[Proposal] = []
        self.queue: deque[Proposal] = deque()
        self.losses: dict[Key, float] = {}
        self.missing: set[Key] = set()

    @property
    def complete(self) -> bool:
        """Whether all results have arrived."""
        return not self.missing

    def go_on(self) -> bool:
        """Advance to the next batch of the procedure; False if there is none."""
        losses = [self.losses[proposal.key] for proposal in self._proposals]
        try:
            self._proposals = self._procedure.send(losses) if self._started else next(self._procedure)
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
    """The fidelities, checked.

    Raises:
        ValueError: unless there is at least one, all of the part ``search``, ascending.
    """
    if not fidelities or any(f.part != "search" for f in fidelities):
        texts = [fidelity.text for fidelity in fidelities]
        raise ValueError(f"Expected `fidelities` of the part search, at least one, got {texts}.")
    if list(fidelities) != sorted(set(fidelities)):
        tokens = [fidelity.n_tokens for fidelity in fidelities]
        raise ValueError(f"Expected `fidelities` to be strictly ascending, got {tokens}.")
    return tuple(fidelities)


def fidelity_of(fidelities: Sequence[Fidelity], n_tokens: int | None) -> Fidelity:
    """The fidelity of this number of tokens; the smallest for None.

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
