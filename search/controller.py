"""The extension point `Controller`: who proposes what to measure next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.spaces.measurement import Fidelity, Measurement


@dataclass(frozen=True)
class Proposal:
    """A wish to have a candidate measured at a fidelity.

    Args:
        candidate: a candidate of the study's space (has `text`).
        fidelity: of the part ``search``.
    """

    candidate: Any
    fidelity: Fidelity

    @property
    def key(self) -> tuple[str, str]:
        """Identity in a study, equal to that of the measurement that answers it."""
        return self.candidate.text, self.fidelity.text


@dataclass(frozen=True)
class Trial:
    """A measurement with its place in the study.

    Args:
        number: 0 for the first measurement of the study, and so on.
        measurement: what was measured.
    """

    number: int
    measurement: Measurement


class Controller(ABC):
    """Proposes candidates and learns from their measurements.

    The state of a controller is a fold of `ask` and `tell`: given the same seed and the same calls it
    proposes the same candidates, in any process, so that a study is continued by replay. It draws random
    numbers only from generators of its own, seeded by the seed, or better by (seed, number of the proposal or
    generation).
    A controller may propose something that was measured before: the study answers from memory at no cost.
    """

    @abstractmethod
    def ask(self, n: int) -> list[Proposal]:
        """At most `n` (> 0) proposals; fewer, or none, while results that are under way must come first.

        An empty list when nothing is under way means that the controller has finished.
        """

    @abstractmethod
    def tell(self, trials: Sequence[Trial]) -> None:
        """Results, in any order, each of them once a proposal; also baselines, which it did not ask for."""

    @property
    def n_measurements(self) -> int:
        """How many measurements it needs before it can be stopped with a result; 0 if it needs none."""
        return 0

    @property
    def notes(self) -> Mapping[str, float]:
        """What it knows of the search that the measurements don't tell, as numbers by name, for people to look at."""
        return {}
