"""Allocation by one threshold for the scores of many layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from secateur.pruners.recipes.allocation.filling import check_reach, in_order, settle, wanted_weights
from secateur.pruners.recipes.allocation.layers import Floats, Ints, Layer, RuleEvidence

# How the scores of a layer become comparable with those of others at a sparsity. No divisor is negative: no order
# changes.
NORMALISATIONS: dict[str, Callable[[Floats, float], Floats]] = {
    "none": lambda scores, _: scores,
    "mean": lambda scores, _: _over(scores, np.abs(scores).mean()),
    "max": lambda scores, _: _over(scores, np.abs(scores).max()),
    "zscore": lambda scores, _: _over(scores - scores.mean(), scores.std() if np.ptp(scores) else 0.0),
    "l2": lambda scores, _: _over(scores, np.linalg.norm(scores)),
    "mask": lambda scores, sparsity: 1 + sparsity * _over(scores, np.abs(scores.mean())),
}


def _over(scores: Floats, divisor: float | np.floating[Any]) -> Floats:
    """Quotient in the precision of float32, that of scores: equal values stay equal. All 0 over 0."""
    if divisor == 0:
        return np.zeros_like(scores)
    return (scores / divisor).astype(np.float32).astype(np.float64)


def one_threshold(
    layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, normalise: str, cost: float
) -> Ints:
    """One threshold for all layers: the lowest scores are removed until enough weights are.

    LLM-Pruner's global option has ``none`` and cost 0 (Ma et al. 2023, arXiv 2305.11627). Numerical Pruning (Shen et
    al. 2025, arXiv 2412.12441) has ``mask`` and cost 1: it pools relaxed masks, which are ``1 - s u / mean(u)`` at a
    sparsity s and scores -u if the penalty on their sum is large, and multiplies those of heads by the channels
    that a head costs.

    Args:
        normalise: of the layer's scores, one of `NORMALISATIONS`.
        cost: exponent of a unit's size next to the smallest unit's: 1 protects large units, -1 compares by weight.
            Negative scores are divided by the power.
    """
    smallest = min(layer.size for layer in layers)
    rows = []
    for layer in layers:
        row = layer.scores
        if layer.n_free:
            factor = (layer.size / smallest) ** cost
            row = NORMALISATIONS[normalise](row.astype(np.float64), sparsity)
            row = np.where(row < 0, row / factor, row * factor)
        rows.append(row)
    return threshold(layers, rows, wanted_weights(layers, sparsity))


def threshold(layers: Sequence[Layer], rows: Sequence[Floats], wanted: int) -> Ints:
    """Numbers of removed units where the lowest scores go first.

    Args:
        rows: of each layer the scores of its units, or of a sample of them.

    Raises:
        BudgetError: if less may go.
    """
    check_reach(layers, wanted, layers)
    ascending = [np.sort(row) for row in rows]
    if all(len(row) == layer.n_units for row, layer in zip(rows, layers, strict=True)):
        free = [row[: layer.n_free] for row, layer in zip(ascending, layers, strict=True)]
        return in_order(layers, free, wanted)
    return settle(layers, _sampled_shares(layers, ascending, wanted), wanted)


def _sampled_shares(layers: Sequence[Layer], ascending: Sequence[Floats], wanted: int) -> Floats:
    """Share of each layer below the threshold, where a score stands for as many weights as its layer has for each."""
    free = [
        row[: len(row) * layer.n_free // layer.n_units] for row, layer in zip(ascending, layers, strict=True)
    ]
    owner = np.repeat(np.arange(len(layers)), [len(row) for row in free])
    each = np.array([1 / max(len(row), 1) for row in ascending])
    place = np.concatenate([(np.arange(len(row)) + 0.5) * x for row, x in zip(free, each, strict=True)])
    order = np.lexsort((place, np.concatenate(free)))
    masses = (each * [layer.n_weights for layer in layers])[owner[order]]
    before = np.cumsum(masses) - masses
    taken = np.clip((wanted - before) / masses, 0.0, 1.0)
    shares: Floats = np.bincount(owner[order], taken, len(layers)) * each
    return shares
