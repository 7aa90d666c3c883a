"""The controller `uniform`: the baselines alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.controllers.procedure import check_fidelities
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import Space


class UniformSettings(Section):
    """No settings."""

    kind: Literal["uniform"] = "uniform"


class Uniform(Controller):
    """The dense model and the uniform candidates at the largest fidelity: the reference of every search."""

    ending = "every baseline is measured, and it proposes nothing else"

    def __init__(
        self, space: Space[Any], fidelities: Sequence[Fidelity], seed: int, settings: UniformSettings
    ) -> None:
        largest = check_fidelities(fidelities)[-1]
        self._left = [Proposal(candidate, largest) for candidate in space.baselines().values()]
        self._n = len(self._left)

    def ask(self, n: int) -> list[Proposal]:
        proposals, self._left = self._left[:n], self._left[n:]
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        """No effect: results are not used."""

    @property
    def n_measurements(self) -> int:
        return self._n
