"""The extension point `Evaluator`: measurements of candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from secateur.spaces.measurement import Fidelity, Measurement


class Evaluator(ABC):
    """Set up once in a worker and kept for its life; turns candidates into measurements.

    An infeasible candidate is a measurement with a reason, never an exception and never a NaN.
    """

    @abstractmethod
    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """Measure a batch.

        Args:
            candidates: canonical texts of the space's candidates.
            fidelity: amount of data, and its part.

        Returns:
            One measurement a candidate, in order.
        """
