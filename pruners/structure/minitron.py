"""Minitron's importance of width: the size of activations."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.structure.evidence import Evidence


def activation(evidence: Evidence) -> Float[Tensor, " units"]:
    """Size of the input: l2 norm over windows of the mean over tokens of ``|x_j|``, l2 over a unit's columns.

    Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2, mean and l2 as aggregates).
    """
    return evidence.by_unit(evidence.seen.window_squares).sum(1).sqrt()
