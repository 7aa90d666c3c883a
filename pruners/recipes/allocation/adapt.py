"""Adapt-Pruner's allocation: shares that grow in steps, by the influence of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.pruners.recipes.allocation.filling import relative_to_largest, to_budget
from secateur.pruners.recipes.allocation.layers import BudgetError, Floats, Ints, Layer, RuleEvidence

STEP, LIMIT, MOST_STEPS = 0.02, 0.99, 1000
"""Growth of every share in a step and the largest share, as Adapt-Pruner has them; and a limit of the steps."""


def adapt(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, rate: float) -> Ints:
    """Shares that grow in steps, faster where a block changes its input's direction less than the mean.

    Adapt-Pruner (arXiv 2502.03460): S <- clip(S + 0.02 - A I, 0, 0.99), with I the blocks'
    influence minus its mean, over its largest absolute value; until enough is removed. There I is measured again on
    the pruned model after each step; here it is the dense model's throughout. The last step is cut to the budget.

    Args:
        rate: the paper's A.
    """
    influence = np.array(evidence.influence)
    centred = influence - influence.mean()
    return to_budget(layers, adapt_shares(relative_to_largest(centred), layers, sparsity, rate), sparsity)


def adapt_shares(relative: Floats, layers: Sequence[Layer], sparsity: float, rate: float) -> Floats:
    """Adapt-Pruner's share of each layer, at the point within a step where the sparsity is reached.

    Args:
        relative: of each block its influence, in [-1, 1], mean 0.
        rate: factor of the influence.

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
