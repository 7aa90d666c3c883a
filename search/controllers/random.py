"""The controller `random`: random candidates of every target in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.controllers.procedure import check_fidelities
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import Space

ATTEMPTS = 50  # draws for one new candidate before a target counts as exhausted


class RandomSettings(Section):
    """No settings."""

    kind: Literal["random"] = "random"


class Random(Controller):
    """Random samples of the space, the targets in turn, each measured at the largest fidelity.

    The baseline of every search. It never proposes a candidate twice, and finishes when no new one is found for any
    target.
    """

    ending = "it drew no candidate that is new"

    def __init__(
        self, space: Space[Any], fidelities: Sequence[Fidelity], seed: int, settings: RandomSettings
    ) -> None:
        self._space = space
        self._largest = check_fidelities(fidelities)[-1]
        self._seed = seed
        self._turn = 0
        self._seen = {candidate.text for candidate in space.baselines().values()}

    def ask(self, n: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        n_failed = 0  # turns in a row
        while len(proposals) < n and n_failed < len(self._space.targets):
            candidate = self._draw(self._turn)
            self._turn += 1
            n_failed = n_failed + 1 if candidate is None else 0
            if candidate is not None:
                proposals.append(Proposal(candidate, self._largest))
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        """No effect: results are not used."""

    def _draw(self, turn: int) -> Any | None:
        """A new candidate of the turn's target, or None."""
        rng = np.random.default_rng((self._seed, turn))
        for _ in range(ATTEMPTS):
            candidate = self._space.sample(rng, turn % len(self._space.targets))
            if candidate.text not in self._seen:
                self._seen.add(candidate.text)
                return candidate
        return None
