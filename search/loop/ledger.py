"""Accounting of a search: spent and remaining budget, and the reason why it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from secateur.search.budget import Budget, Spent
from secateur.search.controller import Proposal, Trial

Key = tuple[str, str]
Reason = Literal["budget", "finished", "exhausted", "stopped"]

ENDINGS: dict[Reason, str] = {
    "budget": "its budget is used up",
    "finished": "the controller has finished",
    "exhausted": "nothing new is left to propose",
    "stopped": "stopped",
}
"""Reasons for the end of a search."""

MAX_KNOWN_IN_A_ROW = 1000
"""Known proposals in a row after which a controller counts as exhausted."""


class Ledger:
    """Counts of the proposals and results of one run of a search, against its budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.spent = Spent()  # on results told, measured in this run or stored before
        self.reason: Reason | None = None  # why the controller is not asked any more
        self._asked: set[Key] = set()  # told or pending
        self._n_evaluations = 0  # of these
        self._told: set[Key] = set()
        self._n_tokens = 0  # spent on results told, and expected for pending ones
        self._n_known_in_a_row = 0

    @property
    def used_up(self) -> bool:
        """True if the budget allows no further proposal."""
        minutes = self.budget.minutes
        return not self._affords(1, 1) or (minutes is not None and self.spent.seconds >= 60 * minutes)

    def affordable(
        self, proposals: Sequence[Proposal], refuse: Callable[[Proposal], bool] = lambda _: False
    ) -> list[Proposal]:
        """The proposals before the first that would exceed the budget; sets `reason` at the end of the search.

        Args:
            proposals: of the controller.
            refuse: told of one that would exceed the budget; true if the search goes on without it.
        """
        kept: list[Proposal] = []
        new: set[Key] = set()
        n_evaluations, n_tokens = 0, 0
        for proposal in proposals:
            if proposal.key in self._asked or proposal.key in new:
                self._n_known_in_a_row += 1
                kept.append(proposal)
                continue
            evaluations = n_evaluations + proposal.fidelity.n_evaluations
            tokens = n_tokens + proposal.fidelity.total_tokens
            if self._affords(evaluations, tokens):
                n_evaluations, n_tokens = evaluations, tokens
                new.add(proposal.key)
                kept.append(proposal)
                self._n_known_in_a_row = 0
            elif not refuse(proposal):
                self.reason = self.reason or "budget"
                return kept
        if self._n_known_in_a_row >= MAX_KNOWN_IN_A_ROW:
            self.reason = self.reason or "exhausted"
        return kept

    def add(self, proposals: Iterable[Proposal]) -> None:
        """Count proposals as pending."""
        for proposal in proposals:
            if proposal.key not in self._asked:
                self._asked.add(proposal.key)
                self._n_evaluations += proposal.fidelity.n_evaluations
                self._n_tokens += proposal.fidelity.total_tokens

    def tell(self, trials: Iterable[Trial]) -> list[Trial]:
        """Count trials as told. Returns the ones not told before, each once."""
        unique = {trial.measurement.key: trial for trial in trials}
        new = [trial for key, trial in unique.items() if key not in self._told]
        self._told.update(unique)
        self._n_tokens += sum(t.measurement.n_tokens - t.measurement.fidelity.total_tokens for t in new)
        self.spent = self.spent.plus(new)
        return new

    def _affords(self, n_evaluations: int, n_tokens: int) -> bool:
        """True if the budget allows this much more."""
        evaluations, tokens = self.budget.evaluations, self.budget.tokens
        n_evaluations += self._n_evaluations
        n_tokens += self._n_tokens
        return (evaluations is None or n_evaluations <= evaluations) and (
            tokens is None or n_tokens <= tokens
        )
