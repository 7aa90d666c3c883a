"""Repairs of masked projections: new weights, or an addition to the bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.linalg import inverse_factor
from secateur.pruners.weights.admm import Fit

LAZY = 32
"""Columns after which their changes are applied to all later columns, in one product."""


@dataclass(frozen=True)
class Masked:
    """A projection and its mask.

    Args:
        weight: dense.
        kept: the mask, True = keep.
        inputs: statistics of the dense model; None unless the repair needs them.
        dampening: added to the second moment's diagonal, as a fraction of its mean, > 0.
        name: the layer, for errors.
    """

    weight: Float[Tensor, "out in"]
    kept: Bool[Tensor, "out in"]
    inputs: InputStatistics | None
    dampening: float
    name: str

    @property
    def seen(self) -> InputStatistics:
        """The statistics; never None."""
        assert self.inputs is not None, "the caller collects what the repair needs"
        return self.inputs


@dataclass(frozen=True)
class Repaired:
    """A repaired projection.

    Args:
        weight: in the dense weight's dtype, exactly zero where the mask has it so.
        added: to the bias, in fp32 (a projection without bias gets one); None: nothing.
    """

    weight: Float[Tensor, "out in"]
    added: Float[Tensor, " out"] | None = None


def nothing(masked: Masked) -> Repaired:
    """No repair: the kept weights are unchanged."""
    return Repaired(masked.weight * masked.kept)


def mean_bias(masked: Masked) -> Repaired:
    """Pruned inputs are replaced by their means: ``sum over pruned j of W_ij E[x_j]`` is added to output i's bias.

    FLAP's compensation (An et al. 2024, arXiv 2312.11983), weight by weight in place of whole columns.
    """
    total = masked.seen.total
    assert total is not None, "streams of blocks collect it"
    mean = total.double() / max(masked.seen.n_tokens, 1)
    gone = (masked.weight.double() * ~masked.kept) @ mean
    return Repaired(masked.weight * masked.kept, gone.float())


def surgery(masked: Masked) -> Repaired:
    """SparseGPT's sweep over the columns, with the mask given: the columns behind compensate for each pruned weight.

    Frantar and Alistarh 2023 (arXiv 2301.00774, eq. 4, algorithm 1 without the choice of the mask). Where all pruned
    columns stand before all kept ones this is the optimum, see `structure.obs.obs_update`; else a column can't
    compensate for later ones, and a row may come out worse than it was: such a row is left unrepaired.
    """
    upper = inverse_factor(masked.seen, masked.dampening, masked.name)
    columns = masked.weight.T.float().contiguous()
    gone = ~masked.kept.T
    n_in = len(columns)
    for start in range(0, n_in, LAZY):
        stop = min(start + LAZY, n_in)
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            removed = columns[j] * gone[j]
            errors[j - start] = removed / upper[j, j]
            columns[j] -= removed
            columns[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return Repaired(_no_worse(masked, columns.T * masked.kept))


def alternating(masked: Masked) -> Repaired:
    """Least squares of the dense outputs under the mask, by 20 steps of ADMM, see `admm.Fit`.

    Fast and Optimal Weight Update (Boza 2024, arXiv 2401.02938). Rows that 20 steps leave worse than they were are
    left unrepaired.
    """
    gram = masked.seen.gram
    assert gram is not None, "the caller collects what the repair needs"
    fit = Fit(
        masked.weight, gram / max(masked.seen.n_tokens, 1), dampening=masked.dampening, name=masked.name
    )
    return Repaired(_no_worse(masked, fit.masked(masked.kept)))


def _no_worse(masked: Masked, fitted: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Fitted rows, where their output's squared error over the calibration tokens is below that of no repair."""
    weight = masked.weight
    repaired, plain = fitted.to(weight.dtype), weight * masked.kept
    better = output_errors(weight, repaired, masked.seen) < output_errors(weight, plain, masked.seen)
    return torch.where(better[:, None], repaired, plain)


def output_errors(
    dense: Float[Tensor, "out in"], weight: Float[Tensor, "out in"], inputs: InputStatistics
) -> Float[Tensor, " out"]:
    """Squared difference of each output under another weight, summed over the tokens."""
    assert inputs.gram is not None
    difference = weight.float() - dense.float()
    return ((difference @ inputs.gram) * difference).sum(1)
