"""The extension point `Controller`: proposes candidates to measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.spaces.measurement import Fidelity, Measurement


@dataclass(frozen=True)
class Proposal:
    """A candidate to measure at a fidelity.

    Args:
        candidate: a candidate of the study's space (has `text`).
        fidelity: of the part ``search``.
    """

    candidate: Any
    fidelity: Fidelity

    @property
    def key(self) -> tuple[str, str]:
        """Identity in a study, equal to that of its measurement."""
        return self.candidate.text, self.fidelity.text


@dataclass(frozen=True, slots=True)
class Trial:
    """A measurement with its place in the study.

    Args:
        number: 0 for the first measurement of the study, and so on.
        measurement: of one candidate at one fidelity.
    """

    number: int
    measurement: Measurement


class Controller(ABC):
    """Proposes candidates and learns from their measurements.

    The state of a controller is a fold of `ask` and `tell`: with the same seed and calls it proposes the same
    candidates, in any process, so that a study is resumed by replay. Its random generators are its own, seeded by the
    seed, or better by (seed, number of the proposal or generation). Proposals may repeat: the study answers known ones
    from memory at no cost.
    """

    @abstractmethod
    def ask(self, n: int) -> list[Proposal]:
        """At most `n` (> 0) proposals; fewer, or none, while it needs pending results.

        An empty list with no result pending means that the controller has finished.
        """

    @abstractmethod
    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn from results, in any order, once a proposal; baselines, which it did not propose, are included."""

    def refuse(self, proposal: Proposal) -> bool:
        """Learn that a proposal exceeds what is left of the budget, and is not measured.

        Returns:
            True if cheaper proposals may follow; False, the default, if the search is to end.
        """
        return False

    ending: str = "it has proposed all that it has"
    """Reason for the end of its proposals, once it has finished."""

    @property
    def n_measurements(self) -> int:
        """Measurements needed before a first result; 0 if none are."""
        return 0

    @property
    def notes(self) -> Mapping[str, float]:
        """Further numbers about the search by name, for display."""
        return {}
