"""ATP's allocation: shares that grow by the same amount from block to block."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.pruners.recipes.allocation.filling import to_budget
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence


def atp(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float, *, slope: float) -> Ints:
    """Shares in an arithmetic progression over the blocks, the first blocks the least.

    ATP (Huang et al. 2025, arXiv 2502.14770): ``s_i = s + beta (i - (L - 1) / 2)`` for block i of L, with
    ``0 < beta <= min(2 s, 2 (1 - s)) / (L - 1)``; beta is found by measuring a grid, 0.002 apart, of a few models. Here
    beta is given as a share of its largest value, so that one value serves models of any depth.

    Args:
        slope: beta over its largest value; 0: uniform. [INFER] The default, half: the paper has no default, and
            searches.
    """
    n_blocks = max(layer.block for layer in layers) + 1
    beta = slope * min(2 * sparsity, 2 * (1 - sparsity)) / max(n_blocks - 1, 1)
    return to_budget(
        layers, [sparsity + beta * (layer.block - (n_blocks - 1) / 2) for layer in layers], sparsity
    )
