"""Wanda for structures."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence


def wanda_sp(evidence: Evidence) -> Float[Tensor, " units"]:
    """Mean of ``|W_ij| ||x_j||`` over a column, and over a unit's columns.

    Wanda (arXiv 2306.11695) for structures, as the released code of FLAP (arXiv 2312.11983) has it.
    """
    return evidence.by_unit(evidence.weight.abs().mean(0) * evidence.seen.norm).mean(1)
