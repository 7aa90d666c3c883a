"""SAP's allocation: shares by the PQ index, the sparsity that a layer's weights have by themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.allocation.filling import to_budget
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence
from secateur.pruners.recipes.context import Sample

LIMIT = 0.9
"""Largest share of a layer, the paper's beta."""


def sap(
    layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, pq_p: float, pq_q: float, eta: float
) -> Ints:
    """Shares by the bound that the PQ index sets on the weights that a layer needs.

    SAP (Diao et al. 2023, arXiv 2302.05601): of d weights with PQ index I at least
    ``r d = d (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p))`` remain (theorem 2), and the layer loses the share
    ``min(gamma (1 - r), beta)``. There gamma is a setting, and the model is trained and pruned again and again; here
    gamma is what meets the budget, at once.

    Args:
        evidence: with the index of each layer, `pq_indices`.
        pq_p: p of the index, below q; 0.5 as published.
        pq_q: q; 1 as published.
        eta: slack of the bound.
    """
    index = np.array(evidence.measured)
    retained = (1 + eta) ** (-pq_q / (pq_q - pq_p)) * (1 - index) ** (pq_p * pq_q / (pq_q - pq_p))
    limited = [
        replace(layer, keep=max(layer.keep, math.ceil((1 - LIMIT) * layer.n_units))) for layer in layers
    ]
    return to_budget(limited, 1 - retained, sparsity)


def pq_indices(anatomy: Anatomy, sample: Sample, *, pq_p: float, pq_q: float) -> tuple[float, ...]:
    """PQ index of each projection's weights."""
    return tuple(pq_index(linear.weight, pq_p, pq_q) for linear in anatomy.linears)


def pq_index(weight: Float[Tensor, "..."], p: float, q: float) -> float:
    """``1 - d^(1/q - 1/p) ||w||_p / ||w||_q`` of the d weights: 0 if all are of one size, near 1 if few are large."""
    sizes = weight.float().abs()

    def norm(power: float) -> float:
        return math.pow(float(sizes.pow(power).sum(dtype=torch.float64)), 1 / power)

    whole = norm(q)
    return 0.0 if not whole else 1 - math.pow(sizes.numel(), 1 / q - 1 / p) * norm(p) / whole
