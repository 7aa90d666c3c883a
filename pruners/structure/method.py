"""Method of structured pruning: the importance that orders units, and the repairs of what is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.structure.evidence import Evidence
from secateur.spaces.method import Detail
from secateur.spaces.methods import CUT_REPAIRS, EXPERT_IMPORTANCES, EXPERT_REPAIRS, IMPORTANCES, UNIT_REPAIRS
from secateur.spaces.names import nearest


@dataclass(frozen=True)
class StructureMethod:
    """Settings of structured pruning: everything that decides the levels of a sub-layer except the data.

    Args:
        importance: a row of `IMPORTANCES`.
        repairs: rows of `CUT_REPAIRS` or `EXPERT_REPAIRS` to prepare.
        dampening: of second moments that importances and repairs invert, as a fraction of the mean diagonal, > 0.
        experts: a row of `EXPERT_IMPORTANCES`; "": of a model without mixtures.
        heads: rank the query heads of each KV group, too, by the same importance.

    Raises:
        ValueError: on an unknown name, or `dampening` out of range.
    """

    importance: str
    repairs: tuple[str, ...] = ("none",)
    dampening: float = 0.01
    experts: str = ""
    heads: bool = False

    def __post_init__(self) -> None:
        check_importance(self.importance)
        for repair in self.repairs:
            if repair not in UNIT_REPAIRS:
                raise ValueError(f"Expected a known `repair`, got {repair!r}.{nearest(repair, UNIT_REPAIRS)}")
        if self.experts and self.experts not in EXPERT_IMPORTANCES:
            raise ValueError(
                f"Expected a known importance of experts, got {self.experts!r}."
                f"{nearest(self.experts, EXPERT_IMPORTANCES)}"
            )
        if self.heads and not {"perturbed", "fairness"}.isdisjoint(self.gradients):
            raise ValueError(
                f"Expected an importance that scores single query heads, got {self.importance}, which scores KV groups."
            )
        if not self.dampening > 0:
            raise ValueError(f"Expected `dampening` > 0, got {self.dampening}.")

    @property
    def sources(self) -> dict[str, str]:
        """Hashes of the sources of importance and repairs, by stage and name."""
        rows = [IMPORTANCES[self.importance], *(UNIT_REPAIRS[name] for name in self.repairs)]
        rows += [EXPERT_IMPORTANCES[self.experts]] if self.experts else []
        return {f"{row.stage}/{row.units[0]}/{row.name}": row.source for row in rows}

    @property
    def needs(self) -> Detail:
        """Statistics of the output projections' inputs that must be collected."""
        rows = (IMPORTANCES[self.importance], *(CUT_REPAIRS[name] for name in self.of_sublayers))
        return max((row.inputs for row in rows), key=get_args(Detail).index)

    @property
    def repair_needs(self) -> Detail:
        """Statistics that repairs alone need."""
        return max(
            (CUT_REPAIRS[name].inputs for name in self.of_sublayers),
            key=get_args(Detail).index,
            default="nothing",
        )

    @property
    def of_sublayers(self) -> tuple[str, ...]:
        """The repairs of KV groups and channels."""
        return tuple(name for name in self.repairs if name in CUT_REPAIRS)

    @property
    def of_experts(self) -> tuple[str, ...]:
        """The repairs of experts, ``none`` among them."""
        return tuple(dict.fromkeys(("none", *(name for name in self.repairs if name in EXPERT_REPAIRS))))

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


def query_order(importance: str, evidence: Evidence) -> Int[Tensor, "groups heads"]:
    """Query heads of each KV group from the most important on, numbered within it; ties as in `importance_order`.

    Scores are those of single heads, of which each group loses as many, ranked within it (Minitron, arXiv 2407.14679).

    Args:
        evidence: of the attention.
    """
    order = importance_order(importance, replace(evidence, layout=evidence.layout.of_queries()))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place.reshape(evidence.layout.n_units, -1).argsort(1)


def check_importance_on(name: str, anatomy: Anatomy) -> None:
    """Raise a ValueError if a known importance can't be used on a model."""
    row = IMPORTANCES[name]
    if row.check_path:
        row.check(anatomy)


def check_importance(name: str, key: str = "importance") -> None:
    """Raise a ValueError, which names the setting, unless it is known."""
    if name not in IMPORTANCES:
        raise ValueError(f"Expected a known `{key}`, got {name!r}.{nearest(name, IMPORTANCES)}")
