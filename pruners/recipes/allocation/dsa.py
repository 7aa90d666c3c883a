"""DSA's allocation: the published function, the variance of the logarithm of a block's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.recipes.allocation.filling import over_range, to_budget
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence
from secateur.pruners.recipes.allocation.scores import wanda_scores
from secateur.pruners.recipes.context import Sample


def dsa(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, dsa_lambda: float) -> Ints:
    """Kept shares that fall with a function of a block's scores, over a range of twice lambda.

    DSA (Li et al., NeurIPS 2024) searches functions by evolution; this is the one that its released code names
    (lliai/DSA): ``asin(atan(var(ln S)))`` with S the block's ``|w| ||x||``, mapped as OWL's released code maps
    outliers, the other way round. Its search is not a part of this. Where the arctangent exceeds 1 the arcsine is
    taken of 1, where there the block counts as 0.

    Args:
        evidence: with `log_variances`.
        dsa_lambda: half the range.
    """
    redundancy = [math.asin(min(math.atan(variance), 1.0)) for variance in evidence.measured]
    return to_budget(layers, over_range(layers, [-x for x in redundancy], sparsity, dsa_lambda), sparsity)


def log_variances(anatomy: Anatomy, sample: Sample) -> tuple[float, ...]:
    """Variance of the logarithm of the scores of each projection's block; that of a score of 0 is 0, as there."""
    found: list[float] = []
    for block in anatomy.blocks:
        scores = wanda_scores(block, sample)
        logs = torch.where(scores == 0, 1.0, scores).log().double()
        found += [float(logs.var())] * len(block.linears)
    return tuple(found)
