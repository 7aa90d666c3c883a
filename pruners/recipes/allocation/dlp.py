"""DLP's allocation: higher shares for blocks whose median score is large."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.allocation.filling import over_range, to_budget
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence
from secateur.pruners.recipes.allocation.scores import wanda_scores
from secateur.pruners.recipes.context import Sample


def dlp(
    layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, alpha: float, centre: str
) -> Ints:
    """Kept shares that fall with the median of a block's scores, over a range of twice alpha.

    DLP (Chen et al. 2025, arXiv 2505.23807): a block's unimportance is the median of ``|w| ||x||`` over all its
    weights; its relative importance is one minus its share of their sum. Importances are mapped linearly onto a
    range as wide as ``2 alpha`` whose mean is what is to be kept, as OWL's released code does. The released code
    (ironartisan/DLP) takes the mean for weights and offers the median for patterns alone: ``centre: mean``.
    Statistics are those of the dense model, as there.

    Args:
        evidence: with `central_scores`.
        alpha: half the range; 0.15 as published.
        centre: of the scores, already used in the evidence.
    """
    unimportance = torch.tensor(evidence.measured, dtype=torch.float64)
    per_block = {layer.block: value for layer, value in zip(layers, unimportance.tolist(), strict=True)}
    importance = (1 - unimportance / sum(per_block.values())).tolist()
    return to_budget(layers, over_range(layers, importance, sparsity, alpha), sparsity)


def central_scores(anatomy: Anatomy, sample: Sample, *, centre: str) -> tuple[float, ...]:
    """Median, of an even number the lower, or mean of the scores of each projection's block."""
    found: list[float] = []
    for block in anatomy.blocks:
        scores = wanda_scores(block, sample)
        value = scores.median() if centre == "median" else scores.mean(dtype=torch.float64)
        found += [float(value)] * len(block.linears)
    return tuple(found)
