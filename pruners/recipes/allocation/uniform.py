"""Uniform allocation: the same share everywhere, but for blocks at the ends."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.pruners.recipes.allocation.filling import to_budget
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence


def uniform(
    layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, skip_first: float, skip_last: float
) -> Ints:
    """The same share everywhere.

    LLM-Pruner leaves the first 4 and the last 2 of 32 blocks alone (Ma et al. 2023, arXiv 2305.11627).

    Args:
        skip_first: share of the blocks at the start that are not pruned.
        skip_last: likewise at the end.
    """
    n_blocks = max(layer.block for layer in layers) + 1
    blocks = range(round(skip_first * n_blocks), n_blocks - round(skip_last * n_blocks))
    return to_budget(layers, [float(layer.block in blocks) for layer in layers], sparsity)
