"""The controller `uniform`: the baselines alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from secateur.search.controller import Proposal
from secateur.search.controllers.batches import ProcedureController, SearchProcedure, check_fidelities
from secateur.spaces.measurement import Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import Space


class UniformSettings(Section):
    """No settings."""

    kind: Literal["uniform"] = "uniform"


class Uniform(ProcedureController):
    """Proposes the baselines at the largest fidelity, and finishes.

    The reference of every search: the dense model and the uniform candidates.
    """

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,  # unused
        settings: UniformSettings,
        objective: str = "loss",
    ) -> None:
        self._space = space
        self._largest = check_fidelities(fidelities)[-1]
        super().__init__(objective, self._procedure())

    @property
    def n_measurements(self) -> int:
        return len(self._space.baselines())

    def _procedure(self) -> SearchProcedure:
        yield [Proposal(candidate, self._largest) for candidate in self._space.baselines().values()]
