"""Magnitude of the columns of output projections as the importance of units."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence


def magnitude(evidence: Evidence) -> Float[Tensor, " units"]:
    """l2 norm of the unit's columns of the output projection (Li et al. 2017, arXiv 1608.08710, for columns)."""
    return evidence.by_unit(evidence.weight.square().sum(0)).sum(1).sqrt()
