"""Method of structured pruning: the importance that orders units, and the repairs of what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.structure.evidence import Evidence
from secateur.spaces.methods import CUT_REPAIRS, IMPORTANCES, Detail
from secateur.spaces.names import nearest


@dataclass(frozen=True)
class StructureMethod:
    """Settings of structured pruning: everything that decides the levels of a sub-layer except the data.

    Args:
        importance: a row of `IMPORTANCES`.
        repairs: rows of `CUT_REPAIRS` to prepare.
        dampening: of second moments that importances and repairs invert, as a fraction of the mean diagonal, > 0.

    Raises:
        ValueError: on an unknown name, or `dampening` out of range.
    """

    importance: str
    repairs: tuple[str, ...] = ("none",)
    dampening: float = 0.01

    def __post_init__(self) -> None:
        check_importance(self.importance)
        for repair in self.repairs:
            if repair not in CUT_REPAIRS:
                raise ValueError(f"Expected a known `repair`, got {repair!r}.{nearest(repair, CUT_REPAIRS)}")
        if not self.dampening > 0:
            raise ValueError(f"Expected `dampening` > 0, got {self.dampening}.")

    @property
    def needs(self) -> Detail:
        """Statistics of the output projections' inputs that must be collected."""
        rows = (IMPORTANCES[self.importance], *(CUT_REPAIRS[name] for name in self.repairs))
        return max((row.inputs for row in rows), key=get_args(Detail).index)

    @property
    def repair_needs(self) -> Detail:
        """Statistics that repairs alone need."""
        return max((CUT_REPAIRS[name].inputs for name in self.repairs), key=get_args(Detail).index)

    @property
    def gradients(self) -> tuple[Kind, ...]:
        """Kinds of gradients that must be collected."""
        return IMPORTANCES[self.importance].gradients


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
