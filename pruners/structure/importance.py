"""Order of the units of a sub-layer by importance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.structure.evidence import Evidence, Score
from secateur.pruners.structure.refit import Needs
from secateur.spaces.methods import IMPORTANCES
from secateur.spaces.names import nearest


@dataclass(frozen=True)
class Importance:
    """An importance of units: a row of the table of methods, a formula, or a blend.

    Args:
        function: the score.
        needs: statistics of inputs that must be collected first.
        gradients: kinds of them that must be collected first, of `KINDS` or `FORWARD_KINDS`.
    """

    function: Score
    needs: Needs
    gradients: tuple[Kind, ...] = ()


def importance_order(importance: str, evidence: Evidence) -> Int[Tensor, " units"]:
    """Units from the most important on; of equal ones the one with the larger index first.

    Raises:
        ValueError: if a score is not finite.
    """
    score: Tensor = IMPORTANCES[importance].function(evidence)
    if not torch.isfinite(score).all():
        raise ValueError(
            f"Expected finite scores, got NaN or infinity at {evidence.layout.name}. Check the calibration text."
        )
    return score.argsort(stable=True).flip(0)


def check_importance(name: str, key: str = "importance") -> None:
    """Raise a ValueError, which names the setting, unless it is known."""
    if name not in IMPORTANCES:
        raise ValueError(f"Expected a known `{key}`, got {name!r}.{nearest(name, IMPORTANCES)}")
