"""ADMM with its gradual mask: alternating directions, with the mask chosen between the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruners.masks import lowest, mask
from secateur.pruners.weights.admm import Fit
from secateur.pruners.weights.method import LayerProblem
from secateur.spaces.levels import n_zeros

N_SPARSE_STEPS = 15
"""Steps that choose a mask; those after it, up to `admm.N_STEPS`, keep the last one."""


def admm_gradual(layer: LayerProblem, sparsities: Sequence[float]) -> Float[Tensor, "levels out in"]:
    """The weight at each sparsity: a mask that grows step by step, and the kept weights fitted to the dense outputs.

    Fast and Effective Weight Update (Boza 2024, arXiv 2401.02938, algorithm 2), the default of its released code. In
    each of the first 15 of 20 steps of `admm.Fit` the weights of the smallest ``|W + U|``, with inputs scaled to the
    norm 1 (so that the first scores are Wanda's), are pruned: ``s (1 - (1 - t/15)^3)`` of them in step t, by default
    from the whole layer. In groups, those that a group may lose go in the same order.

    Differences: at each sparsity the number of zeros is exact. The released code, without groups and over a whole
    layer, chooses all 15 masks at the final sparsity, against the paper; here they grow as in the paper. The
    published dampening is 0.1 of the mean diagonal.

    Raises:
        ValueError: if the inputs are not finite, or the group size does not divide.
    """
    fit = Fit.of(layer)
    return torch.stack([fit.alternate(_masks(layer, x)).to(layer.weight.dtype) for x in sparsities])


def shares(sparsity: float) -> list[float]:
    """Sparsity in each of the steps that choose a mask: a cubic rise (Zhu and Gupta 2017, arXiv 1710.01878)."""
    return [sparsity - sparsity * (1 - step / N_SPARSE_STEPS) ** 3 for step in range(1, N_SPARSE_STEPS + 1)]


def _masks(
    layer: LayerProblem, sparsity: float
) -> Callable[[int, Float[Tensor, "out in"]], Bool[Tensor, "out in"]]:
    """Masks by step and scaled weights."""
    steps = shares(sparsity)
    last: Bool[Tensor, "out in"] | None = None

    def at(step: int, scaled: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        nonlocal last
        if last is None or step < len(steps):
            last = _mask(layer, scaled.abs(), steps[step], sparsity)
        return last

    return at


def _mask(
    layer: LayerProblem, score: Float[Tensor, "out in"], share: float, sparsity: float
) -> Bool[Tensor, "out in"]:
    """Mask (True = keep) of a step: of the weights that groups may lose at the end, this share of all goes now."""
    if layer.group_size is None:
        return mask(score, share, comparison=layer.comparison, name=layer.name)
    may_stay = mask(score, sparsity, group_size=layer.group_size, name=layer.name)
    count = min(n_zeros(share, score.numel()), int((~may_stay).sum()))
    return ~lowest(score.masked_fill(may_stay, torch.inf).flatten(), count).reshape(score.shape)
