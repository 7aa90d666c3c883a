"""OWL's allocation: lower shares for layers with many outliers among their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.allocation.filling import over_range, relative_to_largest, to_budget
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence
from secateur.pruners.recipes.context import Sample


def owl(
    layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, spread: float, factor: float
) -> Ints:
    """Lower shares for linears with many outliers among their scores.

    OWL (Yin et al. 2024, arXiv 2310.05175): the layerwise outlier distribution D is the share of scores that are
    above `factor` times their mean; the sparsity falls with D, stays within [s - spread, s + spread], and its mean
    is s. Here the layer that is farthest from the mean of D is at one end of that range; the released code maps the
    range of D onto one as wide as 2 spread and then shifts it to the mean, so that single layers can leave it.

    Args:
        evidence: with outliers, counted with `factor`.
        spread: the paper's lambda.
        factor: the paper's M, already used in `outliers`.
    """
    outliers = np.array(evidence.outliers)
    centred = outliers - np.average(outliers, weights=[layer.n_weights for layer in layers])
    return to_budget(layers, np.clip(sparsity - spread * relative_to_largest(centred), 0.0, 1.0), sparsity)


def owl_released(
    layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, owl_lambda: float, owl_m: float
) -> Ints:
    """Kept shares over a range of twice lambda by the share of outliers, as OWL's released code maps them.

    OWL (Yin et al. 2024, arXiv 2310.05175, luuyin/OWL): the block with the most outliers keeps ``2 lambda`` more than
    the one with the fewest, the others by their place between, and the mean is what is to be kept; see `owl` for the
    paper's limit. No difference from the released code is known: both count in the dense model.

    Args:
        evidence: with the shares of `released_outliers`.
        owl_lambda: half the range.
        owl_m: the paper's M, already used in the evidence.
    """
    return to_budget(layers, over_range(layers, evidence.measured, sparsity, owl_lambda), sparsity)


def released_outliers(anatomy: Anatomy, sample: Sample, *, owl_m: float) -> tuple[float, ...]:
    """Share of outliers of each projection's block, see `outlier_shares`."""
    return outlier_shares(anatomy, sample.statistics, owl_m)


def outlier_shares(anatomy: Anatomy, statistics: CalibrationStatistics, factor: float) -> tuple[float, ...]:
    """For each projection the share of its block's weights that score above `factor` times the block's mean.

    The layerwise outlier distribution of OWL (Yin et al. 2024, arXiv 2310.05175, eq. 1), with Wanda's ``|w| ||x||`` as
    the score; all projections of a block are counted together, as in the released code.

    Args:
        statistics: of it, with moments of inputs.
        factor: M.
    """
    shares: list[float] = []
    for block in anatomy.blocks:
        inputs = statistics.inputs(block.index)
        scores = [linear.weight.float().abs() * inputs[linear.name].norm for linear in block.linears]
        n_weights = sum(linear.n_weights for linear in block.linears)
        threshold = factor * sum(float(score.sum(dtype=torch.float64)) for score in scores) / n_weights
        n_above = sum(int((score > threshold).sum()) for score in scores)
        shares += [n_above / n_weights] * len(block.linears)
    return tuple(shares)
