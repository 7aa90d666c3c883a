"""How many weights of a block stand out: what OWL gives blocks their shares of sparsity by."""

from __future__ import annotations

import torch

from secateur.pruners.calibration.collected import CalibrationStatistics
from secateur.pruners.models.anatomy import Anatomy


def outlier_shares(anatomy: Anatomy, statistics: CalibrationStatistics, factor: float) -> tuple[float, ...]:
    """For each projection the share of its block's weights that score above `factor` times the block's mean.

    The layerwise outlier distribution of OWL (Yin et al. 2024, arXiv 2310.05175, eq. 1), with Wanda's ``|w| ||x||`` as
    the score; all projections of a block are counted together, as in the released code.

    Args:
        anatomy: the dense model.
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
