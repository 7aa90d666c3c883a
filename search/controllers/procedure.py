"""Base of controllers written as search procedures: generators that propose a batch and wait for its losses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from secateur.search.controller import Controller, Proposal, Trial
from secateur.spaces.measurement import Effects, Fidelity, Measurement

Key = tuple[str, str]

Losses = list[float]
"""One loss a proposal of the batch, in order; infinite if the candidate is infeasible."""

SearchProcedure = Generator[list[Proposal], Losses, None]
"""A search as a generator: yields a batch of proposals and receives their losses, until it has finished."""


def side_by_side(procedures: Sequence[SearchProcedure]) -> SearchProcedure:
    """Procedures as one: their present batches are proposed together, and each goes on when all are measured."""
    batches: dict[int, list[Proposal]] = {}
    for index, procedure in enumerate(procedures):
        _advance(batches, index, procedure, None)
    while batches:
        losses = iter((yield [proposal for batch in batches.values() for proposal in batch]))
        for index, batch in list(batches.items()):
            _advance(batches, index, procedures[index], [next(losses) for _ in batch])


def _advance(
    batches: dict[int, list[Proposal]], index: int, procedure: SearchProcedure, losses: Losses | None
) -> None:
    """Replace a procedure's batch by its next one, or drop it at its end."""
    try:
        batches[index] = next(procedure) if losses is None else procedure.send(losses)
    except StopIteration:
        batches.pop(index, None)


class ProcedureController(Controller):
    """Controller that runs search procedures: proposes their batches in parts, accepts results in any order.

    Several procedures may be open at a time: while one waits for results, another proposes. Only open batches are
    kept, so that the time of `ask` does not grow with the number of trials.

    Args:
        objective: name of the value to minimise.
    """

    def __init__(self, objective: str) -> None:
        self._objective = objective
        self._waiting: dict[Key, list[_Batch]] = {}
        self._ready: deque[_Batch] = deque()  # with proposals left, or complete
        self._n_open = 0  # unfinished procedures
        self._exhausted = False  # no further procedure before the next result
        self.effects: dict[Key, Effects] = {}
        """Effects that measurements of the part ``gradient`` gave."""

    def ask(self, n: int) -> list[Proposal]:
        proposals = self._next_proposals(n)
        while not proposals and not self._exhausted:
            self._exhausted = not self._begin()
            proposals = self._next_proposals(n)
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            key = trial.measurement.key
            if trial.measurement.effects is not None:
                self.effects[key] = trial.measurement.effects
            self._settle(key, loss_of(trial.measurement, self._objective))
        self._exhausted = False

    def refuse(self, proposal: Proposal) -> bool:
        if not self._can_go_on():
            return False
        self._settle(proposal.key, math.inf)
        self._exhausted = False
        return True

    def _can_go_on(self) -> bool:
        """True if the search may go on without a proposal that exceeds the budget, whose loss is infinite then."""
        return False

    def _begin(self) -> bool:
        """Open a procedure while the open ones wait for results; False if there is none at present."""
        return False

    def _open(self, procedure: SearchProcedure) -> None:
        """Add a procedure, after the open ones."""
        self._ready.append(_Batch(procedure))
        self._n_open += 1

    def _settle(self, key: Key, loss: float) -> None:
        """Give a loss to the batches that wait for it."""
        for batch in self._waiting.pop(key, ()):
            batch.missing.discard(key)
            batch.losses[key] = loss
            if not batch.missing and batch not in self._ready:
                self._ready.append(batch)

    def _next_proposals(self, n: int) -> list[Proposal]:
        """At most `n` proposals, of the procedures in order; none if all wait for results or have finished."""
        proposals: list[Proposal] = []
        while self._ready and len(proposals) < n:
            batch = self._ready[0]
            if not batch.missing:
                self._advance(batch)
                continue
            proposals += [batch.queue.popleft() for _ in range(min(n - len(proposals), len(batch.queue)))]
            if not batch.queue:
                self._ready.popleft()
        return proposals

    def _advance(self, batch: _Batch) -> None:
        """Continue with the procedure's next batch, or close the procedure."""
        try:
            batch.advance()
        except StopIteration:
            self._ready.remove(batch)
            self._n_open -= 1
        for key in batch.missing:
            self._waiting.setdefault(key, []).append(batch)


@dataclass(eq=False)
class _Batch:
    """Present batch of one procedure."""

    procedure: SearchProcedure
    keys: list[Key] | None = None  # None before the first batch
    queue: deque[Proposal] = field(default_factory=deque)
    losses: dict[Key, float] = field(default_factory=dict)
    missing: set[Key] = field(default_factory=set)

    def advance(self) -> None:
        """Advance to the procedure's next batch; StopIteration if there is none."""
        if self.keys is None:
            proposals = next(self.procedure)
        else:
            proposals = self.procedure.send([self.losses[key] for key in self.keys])
        unique = {proposal.key: proposal for proposal in proposals}
        self.keys, self.losses = [proposal.key for proposal in proposals], {}
        self.missing, self.queue = set(unique), deque(unique.values())


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
