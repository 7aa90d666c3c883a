"""The controller `random`: random candidates of every target in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.controllers.batches import check_fidelities
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import Space

ATTEMPTS = 50  # draws for one new candidate before a target is taken to be exhausted


class RandomSettings(Section):
    """There is nothing to set."""

    kind: Literal["random"] = "random"


class Random(Controller):
    """Samples of the space, target by target in turn, each measured at the largest fidelity.

    Goes on for as long as it is asked, and never proposes a candidate twice: it finishes when no new one
    turns up for any target. The baseline of every search: it needs no results.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,
        settings: RandomSettings,  # nothing to set
        objective: str = "loss",  # it learns from nothing
    ) -> None:
        self._space = space
        self._largest = check_fidelities(fidelities)[-1]
        self._seed = seed
        self._turn = 0
        self._seen = {candidate.text for candidate in space.baselines().values()}

    def ask(self, n: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        n_failed = 0
        while len(proposals) < n and n_failed < len(self._space.targets):
            candidate = self._draw(self._turn)
            self._turn += 1
            if candidate is None:
                n_failed += 1
            else:
                proposals.append(Proposal(candidate, self._largest))
                n_failed = 0
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        """Nothing is learned."""

    def _draw(self, turn: int) -> Any | None:
        """A new candidate of the target whose turn it is, or None."""
        rng = np.random.default_rng((self._seed, turn))
        for _ in range(ATTEMPTS):
            candidate = self._space.sample(rng, turn % len(self._space.targets))
            if candidate.text not in self._seen:
                self._seen.add(candidate.text)
                return candidate
        return None
