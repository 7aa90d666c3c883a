"""SLEB: the block without which the loss is lowest, one after the other."""

from __future__ import annotations

import math

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.depth.shortened import loss_without
from secateur.pruners.models.anatomy import Anatomy


def sleb(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Cross-entropy of the model without the block, see `loss_without`; the first and the last block stay.

    SLEB (Song et al. 2024, arXiv 2402.09025), with ``schedule: {step: 0.001}``: a block goes, and all others are
    measured again. The released code sums over 128 sequences of WikiText-2's training part.
    """
    losses = loss_without(anatomy, tokens, whole)
    return (math.inf, *losses[1:-1], math.inf) if len(losses) > 1 else losses
