"""CFSP's allocation: kept shares by a sigmoid of the angle between a block's input and output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from secateur.pruners.recipes.allocation.filling import check_reach, to_budget, wanted_weights
from secateur.pruners.recipes.allocation.layers import Floats, Ints, Layer, RuleEvidence


def cfsp(
    layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, a: float, sublayers: str
) -> Ints:
    """Kept shares by a sigmoid of the angle between a block's input and output.

    CFSP (Wang et al. 2025, arXiv 2409.13199): t = sigmoid(a (I - mean I) / 1e4), with I the sum over tokens of the
    angle between a block's input and output, over pi; keeps (1 - s) t / mean t. If that is 1 or more anywhere, all
    deviations from the mean shrink. The constant presumes 128 windows of 1024 tokens: here I is a mean over however
    many tokens there are, times as many. [INFER] The angle is that of the mean cosine, not the mean of the angles.

    Args:
        a: factor of the influence; 0: uniform.
        sublayers: ``mlp`` as published, with all attentions kept, or ``both``.
    """
    if sublayers == "mlp":
        layers = [replace(x, keep=x.n_units) if x.kind == "attention" else x for x in layers]
    free = np.array([layer.n_weights * (layer.n_free > 0) for layer in layers], np.float64)
    wanted = wanted_weights(layers, sparsity)
    check_reach(layers, wanted, layers)
    angles = np.arccos(np.clip(1 - np.array(evidence.influence), -1, 1)) / math.pi
    kept = cfsp_keeps(angles[[layer.block for layer in layers]], free, wanted / free.sum(), a)
    return to_budget(layers, np.where(free > 0, 1 - kept, 0), sparsity)


PRESUMED_TOKENS = 128 * 1024


def cfsp_keeps(angles: Floats, weights: Floats, sparsity: float, a: float) -> Floats:
    """CFSP's kept shares.

    Args:
        angles: mean angle over pi, of each layer's block.
        weights: of the layers, in means.
        sparsity: share of these weights to remove.
        a: factor of the angles.
    """
    centred = angles - np.average(angles, weights=weights)
    t = 1 / (1 + np.exp(-a * PRESUMED_TOKENS * centred / 1e4))
    mean, largest = np.average(t, weights=weights), t[weights > 0].max()
    if largest > mean and (1 - sparsity) * largest / mean >= 1:
        shrink = mean * (1 / (1 - sparsity) - 1) / (largest - mean) / 1.05
        t = mean + shrink * (t - mean)
    return (1 - sparsity) * t / mean
