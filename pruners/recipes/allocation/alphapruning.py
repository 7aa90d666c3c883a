"""AlphaPruning's allocation: shares by the tail of the spectrum of a block's weight matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.allocation.filling import to_budget
from secateur.pruners.recipes.allocation.layers import Floats, Ints, Layer, RuleEvidence
from secateur.pruners.recipes.context import Sample

N_BINS = 100
"""Bins of the histogram of logarithms whose highest is the peak of the spectrum."""

LOWER, UPPER = 0.95, 1.5
"""Range of the tail's lower end, in multiples of the peak."""


def alphapruning(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, epsilon: float) -> Ints:
    """Higher shares for blocks whose spectra have lighter tails.

    AlphaPruning (Lu et al. 2024, arXiv 2410.10912, eq. 3): exponents, meant over a block, are mapped linearly onto
    ``[1 - epsilon, 1 + epsilon]``, and all are scaled by one factor to the budget. A heavy tail, a small exponent,
    is taken for a well-trained layer. No data are needed.

    Args:
        evidence: with `block_exponents`.
        epsilon: half the range of the factors; 0.3 with Wanda, 0.2 with SparseGPT, 0.5 with magnitude as published.
    """
    return to_budget(layers, linear_factors(np.array(evidence.measured), epsilon), sparsity)


def linear_factors(exponents: Floats, epsilon: float) -> Floats:
    """Factors from ``1 - epsilon``, of the smallest exponent, to ``1 + epsilon``; equal ones give 1."""
    width = float(np.ptp(exponents))
    if width < 1e-12:
        return np.ones_like(exponents)
    factors: Floats = 1 - epsilon + 2 * epsilon * (exponents - exponents.min()) / width
    return factors


def block_exponents(anatomy: Anatomy, sample: Sample) -> tuple[float, ...]:
    """Mean over each projection's block of the exponents of its matrices, see `tail_exponent`."""
    found: list[float] = []
    for block in anatomy.blocks:
        exponents = [tail_exponent(spectrum(linear.weight)) for linear in block.linears]
        found += [sum(exponents) / len(exponents)] * len(block.linears)
    return tuple(found)


def spectrum(weight: Float[Tensor, "out in"]) -> Float[Tensor, " eigenvalues"]:
    """Eigenvalues of ``W W^T``, or of ``W^T W`` if that is smaller, ascending; those of rounding are left out."""
    matrix = weight.double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values: Tensor = torch.linalg.eigvalsh(matrix @ matrix.T)
    return values[values > values[-1].clamp_min(torch.finfo(values.dtype).tiny) * 1e-12]


def tail_exponent(eigenvalues: Float[Tensor, " eigenvalues"]) -> float:
    """Exponent of a power law fitted to the tail of a spectrum, by Hill's estimator.

    PL_Alpha_Hill (arXiv 2410.10912, eq. 2): ``alpha = 1 + k / sum_i ln(lambda_i / lambda_min)`` over the k eigenvalues
    from lambda_min on. Where the tail begins is the eigenvalue near the peak of the spectrum, see `LOWER` and `UPPER`,
    whose tail is nearest to its power law by Kolmogorov and Smirnov's distance. The released code compares the
    logarithm of the lower limit with eigenvalues, which lets nearly all below the peak in.

    Args:
        eigenvalues: positive, ascending.

    Returns:
        The exponent; 1 where there are too few eigenvalues for a tail.
    """
    logs = eigenvalues.log()
    n, best = len(logs), (float("inf"), 1.0)
    for start in _starts(eigenvalues).tolist():
        above = logs[start:] - logs[start]
        total, size = float(above.sum()), n - start
        if total > 0:
            alpha = 1 + size / total
            empirical = torch.arange(size, dtype=logs.dtype, device=logs.device) / size
            distance = float((1 - torch.exp((1 - alpha) * above) - empirical).abs().max())
            best = min(best, (distance, alpha))
    return best[1]


def _starts(eigenvalues: Float[Tensor, " eigenvalues"]) -> Tensor:
    """Indices at which the tail may begin, but for the last: those near the peak, or the one next above it."""
    logs = eigenvalues.log10().cpu()
    counts = torch.histc(logs.float(), N_BINS)
    edges = torch.linspace(float(logs[0]), float(logs[-1]), N_BINS + 1, dtype=torch.float64)
    peak = 10.0 ** float(edges[counts.argmax()])
    near = (eigenvalues >= LOWER * peak) & (eigenvalues <= UPPER * peak)
    found = near[:-1].nonzero().flatten()
    first = int((eigenvalues < peak).sum().clamp(max=max(len(eigenvalues) - 2, 0)))
    return found if len(found) else torch.tensor([first])
