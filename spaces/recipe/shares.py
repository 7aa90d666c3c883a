"""Allocation by a share for each layer, from what its block is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from secateur.spaces.recipe.filling import check_reach, meet, settle, wanted_weights
from secateur.spaces.recipe.layers import BudgetError, Evidence, Floats, Ints, Layer


def uniform(
    layers: Sequence[Layer], evidence: Evidence, sparsity: float, *, skip_first: float, skip_last: float
) -> Ints:
    """The same share everywhere.

    LLM-Pruner leaves the first 4 and the last 2 of 32 blocks alone (Ma et al. 2023, arXiv 2305.11627).

    Args:
        layers: that share the budget.
        evidence: not used.
        sparsity: share to remove.
        skip_first: share of the blocks that stay whole at the start.
        skip_last: likewise at the end.
    """
    n_blocks = max(layer.block for layer in layers) + 1
    blocks = range(round(skip_first * n_blocks), n_blocks - round(skip_last * n_blocks))
    return to_budget(layers, [float(layer.block in blocks) for layer in layers], sparsity)


def cfsp(layers: Sequence[Layer], evidence: Evidence, sparsity: float, *, a: float, sublayers: str) -> Ints:
    """What a block keeps follows the sigmoid of how far it turns its input.

    CFSP (Wang et al. 2025, arXiv 2409.13199): t = sigmoid(a (I - mean I) / 1e4), with I the sum over tokens of the
    angle between a block's input and output, over pi; keeps (1 - s) t / mean t. If that is 1 or more anywhere, all
    deviations from the mean shrink. The constant presumes 128 windows of 1024 tokens: here I is a mean over however
    many tokens there are, times as many. [INFER] The angle is that of the mean cosine, not the mean of the angles.

    Args:
        layers: that share the budget.
        evidence: with influence.
        sparsity: share to remove.
        a: how much the influence counts; 0: uniform.
        sublayers: ``mlp`` as published: attentions stay whole; or ``both``.
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
        weights: what each layer counts for in means.
        sparsity: share of these weights to remove.
        a: how much angles count.
    """
    centred = angles - np.average(angles, weights=weights)
    t = 1 / (1 + np.exp(-a * PRESUMED_TOKENS * centred / 1e4))
    mean, largest = np.average(t, weights=weights), t[weights > 0].max()
    if largest > mean and (1 - sparsity) * largest / mean >= 1:
        shrink = mean * (1 / (1 - sparsity) - 1) / (largest - mean) / 1.05
        t = mean + shrink * (t - mean)
    return (1 - sparsity) * t / mean


STEP, LIMIT, MOST_STEPS = 0.02, 0.99, 1000
"""Of Adapt-Pruner: what a step adds to every share, the largest share; and how many steps are worth a try."""


def adapt(layers: Sequence[Layer], evidence: Evidence, sparsity: float, *, rate: float) -> Ints:
    """Shares that grow in steps, faster where a block turns its input less than the mean.

    Adapt-Pruner (arXiv 2502.03460): S <- clip(S + 0.02 - A I, 0, 0.99), with I the blocks'
    influence minus its mean, over its largest absolute value; until enough is gone. There I is measured again after
    each step, on what is left; here it is the dense model's throughout. The last step goes as far as it must.

    Args:
        layers: that share the budget.
        evidence: with influence.
        sparsity: share to remove.
        rate: the paper's A.
    """
    influence = np.array(evidence.influence)
    centred = influence - influence.mean()
    return to_budget(layers, adapt_shares(_relative(centred), layers, sparsity, rate), sparsity)


def adapt_shares(relative: Floats, layers: Sequence[Layer], sparsity: float, rate: float) -> Floats:
    """Adapt-Pruner's share of each layer, at the point within a step where the sparsity is reached.

    Args:
        relative: of each block its influence, in [-1, 1], mean 0.
        layers: that share the budget.
        sparsity: share to remove.
        rate: how much influence counts.

    Raises:
        BudgetError: if the shares stop growing before.
    """
    limits = np.array([min(LIMIT, layer.n_free / layer.n_units) for layer in layers])
    weights = np.array([layer.n_weights for layer in layers], np.float64)
    growth = STEP - rate * relative[[layer.block for layer in layers]]
    wanted, shares, before = sparsity * weights.sum(), np.zeros(len(layers), np.float64), 0.0
    for _ in range(MOST_STEPS):
        after = np.clip(shares + growth, 0.0, limits)
        total = float(after @ weights)
        if total >= wanted:
            shares += (after - shares) * ((wanted - before) / max(total - before, 1e-12))
            return shares
        if np.array_equal(after, shares):
            break
        shares, before = after, total
    raise BudgetError(
        f"Expected `sparsity` <= {before / weights.sum():.4f}, as far as the rule adapt goes with `rate` {rate:g}, "
        f"got {sparsity:g}. Lower one of them."
    )


def owl(
    layers: Sequence[Layer], evidence: Evidence, sparsity: float, *, spread: float, factor: float
) -> Ints:
    """Linears with many outliers among their scores lose less.

    OWL (Yin et al. 2024, arXiv 2310.05175): the layerwise outlier distribution D is the share of scores that are
    above `factor` times their mean; the sparsity falls with D, stays within [s - spread, s + spread], and its mean
    is s. Here the layer that is farthest from the mean of D is at one end of that range; the released code maps the
    range of D onto one as wide as 2 spread and then shifts it to the mean, so that single layers can leave it.

    Args:
        layers: that share the budget.
        evidence: with outliers, counted with `factor`.
        sparsity: share to remove.
        spread: the paper's lambda.
        factor: the paper's M; what was counted with it is all that counts here.
    """
    outliers = np.array(evidence.outliers)
    centred = outliers - np.average(outliers, weights=[layer.n_weights for layer in layers])
    return to_budget(layers, np.clip(sparsity - spread * _relative(centred), 0.0, 1.0), sparsity)


def _relative(centred: Floats) -> Floats:
    """Over the largest absolute value; 0 where all are equal but for rounding."""
    largest = float(np.abs(centred).max())
    return centred / largest if largest > 1e-12 else np.zeros_like(centred)


def to_budget(layers: Sequence[Layer], shares: Sequence[float] | Floats, sparsity: float) -> Ints:
    """Units that go, as near to the shares as the budget allows, which scales them all where they miss it."""
    wanted = wanted_weights(layers, sparsity)
    return settle(layers, meet(layers, np.asarray(shares, np.float64), wanted), wanted)
