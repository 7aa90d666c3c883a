"""DSnoT: swaps of pruned and kept weights that bring the layer's mean output to the dense one's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruners.weights.method import LayerProblem
from secateur.pruners.weights.wanda import wanda_mask

N_SWAPS = 50


def dsnot(layer: LayerProblem, sparsities: Sequence[float]) -> Float[Tensor, "levels out in"]:
    """The weight at each sparsity: Wanda's mask, improved row by row.

    Dynamic Sparse no Training (Zhang et al. 2024, arXiv 2310.08915, eq. 3 to 6). The expected error of an output
    is ``e = sum over pruned j of W_ij E[x_j]``. A swap revives the pruned weight with the largest
    ``sign(e) W_ij E[x_j] / Var(x_j)``, and prunes of the kept weights with ``sign(e) W_ij E[x_j] < 0`` the one of
    the smallest ``|W_ij| ||x_j||``. So a row keeps its number of zeros.

    Differences from the paper: a row stops before the first swap that would not lower ``|e|``, and after 50, where
    the paper stops when ``|e|`` is below 0.1 in units of its models; no patterns of n of m.
    """
    masks = (_swapped(wanda_mask(layer, sparsity), layer) for sparsity in sparsities)
    return torch.stack([layer.weight * kept for kept in masks])


def _swapped(kept: Bool[Tensor, "out in"], layer: LayerProblem) -> Bool[Tensor, "out in"]:
    """The mask (True = keep) after the swaps."""
    weight, inputs = layer.weight.float(), layer.inputs
    assert inputs.total is not None, "the caller collects what the registry says that is needed"
    mean = inputs.total / max(inputs.n_tokens, 1)
    variance = (inputs.norm.square() - mean.square()).clamp_min(torch.finfo(torch.float32).tiny)
    given, price = weight * mean, weight.abs() * inputs.norm
    kept = kept.clone()
    error = (given * ~kept).sum(1)
    rows = torch.arange(len(weight), device=weight.device)
    for _ in range(N_SWAPS):
        sign = error.sign()[rows, None]
        gain = (sign * given[rows] / variance).masked_fill(kept[rows], -torch.inf)
        grown = gain.argmax(1)
        allowed = kept[rows] & (sign * given[rows] < 0)
        pruned = price[rows].masked_fill(~allowed, torch.inf).argmin(1)
        after = error[rows] - given[rows, grown] + given[rows, pruned]
        better = (after.abs() < error[rows].abs()) & allowed.any(1) & ~kept[rows].all(1)
        rows, grown, pruned, after = rows[better], grown[better], pruned[better], after[better]
        if not len(rows):
            break
        kept[rows, grown], kept[rows, pruned], error[rows] = True, False, after
    return kept
