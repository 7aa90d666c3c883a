"""Masks and ranks from scores, with exactly as many zeros as `n_zeros` says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy
from secateur.spaces.levels import n_zeros
from secateur.spaces.method import Comparison

MAX_LEVELS = 255
"""Ranks are stored in one byte; 255 means "never pruned"."""

KEPT = 255


def prune_ranks(
    score: Float[Tensor, "out in"],
    levels: Sequence[float],
    *,
    comparison: Comparison = "output",
    group_size: int | None = None,
    name: str = "the weight",
) -> UInt8[Tensor, "out in"]:
    """First level at which each weight is pruned: one byte serves all levels.

    The mask (True = keep) at level `l` is ``ranks > l``. Level `l` has exactly
    ``n_zeros(levels[l], out * in)`` zeros. With `comparison` ``output`` they are spread over the rows as
    evenly as whole numbers allow (the first rows take one more), with ``layer`` over the whole matrix.
    With `group_size` each run of so many inputs loses ``n_zeros(level, group_size)`` of its weights, and
    `comparison` does not matter. Ties are broken by position: the weight with the smaller index is pruned first.

    Args:
        score: importance, higher = keep; any real dtype.
        levels: ascending sparsities in [0, 1], the first one 0.0, at most 255 of them.
        comparison: who competes with whom.
        group_size: length of the groups of an `n_keep` of `group_size` pattern; it divides ``in``.
        name: the layer, for errors.

    Raises:
        ValueError: on scores that are not finite, levels out of order, or a group size that does not divide.
    """
    _check(score, levels, name)
    groups = as_groups(score, comparison, group_size, name)
    n_groups, size = groups.shape
    totals = torch.tensor([_n_pruned(level, groups, group_size) for level in levels])
    # Row r of R takes the r-th share of C: floor((C + R - 1 - r) / R). Monotone in C, so levels are nested.
    offset = n_groups - 1 - torch.arange(n_groups)
    counts = (totals[None, :] + offset[:, None]) // n_groups
    by_position = _first_level_above(counts, size)
    order = groups.argsort(dim=1, stable=True)
    ranks = torch.empty_like(order, dtype=torch.uint8)
    ranks.scatter_(1, order, by_position.to(order.device))
    return ranks.reshape(score.shape)


def mask(
    score: Float[Tensor, "out in"],
    sparsity: float,
    *,
    comparison: Comparison = "output",
    group_size: int | None = None,
    name: str = "the weight",
) -> Bool[Tensor, "out in"]:
    """Mask (True = keep) at one sparsity; see `prune_ranks` for the rules.

    Equal to ``prune_ranks(score, (0.0, sparsity)) > 1``, by selection in place of sorting.
    """
    _check(score, (0.0, sparsity), name)
    groups = as_groups(score, comparison, group_size, name)
    n_groups = len(groups)
    fewer, n_more = divmod(_n_pruned(sparsity, groups, group_size), n_groups)  # the first rows take one more
    kept = torch.ones_like(groups, dtype=torch.bool)
    for rows, count in ((slice(0, n_more), fewer + 1), (slice(n_more, n_groups), fewer)):
        if count and groups[rows].shape[0]:
            kept[rows] = ~_first_lowest(groups[rows], count)
    return kept.reshape(score.shape)


def _n_pruned(sparsity: float, groups: Float[Tensor, "groups size"], group_size: int | None) -> int:
    return (
        n_zeros(sparsity, groups.numel())
        if group_size is None
        else n_zeros(sparsity, group_size) * len(groups)
    )


def _first_lowest(score: Float[Tensor, "rows n"], count: int) -> Bool[Tensor, "rows n"]:
    """True at exactly `count` (> 0) smallest entries of each row; of equal ones at the first."""
    threshold = _kth_smallest(score, count)
    chosen = score <= threshold
    if _n_true(chosen) > count * score.shape[0]:  # equal ones on both sides of the threshold, in some row
        below, equal = score < threshold, score == threshold
        chosen = below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))
    return chosen


def _kth_smallest(score: Float[Tensor, "rows n"], count: int) -> Float[Tensor, "rows 1"]:
    """The `count`-th smallest value of each row. NumPy's selection is vectorised, about six times torch's."""
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(score.numpy(), count - 1, axis=1)[:, count - 1 : count])
    return score.kthvalue(count, dim=1, keepdim=True).values


def _n_true(chosen: Bool[Tensor, "rows n"]) -> int:
    return int(np.count_nonzero(chosen.numpy()) if chosen.device.type == "cpu" else chosen.sum())


def lowest(score: Float[Tensor, "... n"], count: int) -> Bool[Tensor, "... n"]:
    """True at exactly `count` smallest entries of the last axis."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    if count > 0:
        chosen.scatter_(-1, score.topk(count, dim=-1, largest=False, sorted=False).indices, True)
    return chosen


def _check(score: Tensor, levels: Sequence[float], name: str) -> None:
    if not all(math.isfinite(end) for end in score.aminmax()):  # NaN comes through
        raise ValueError(
            f"Expected finite scores, got NaN or infinity at {name}. Check the metric's formula."
        )
    ascending = all(low < high for low, high in pairwise(levels))
    if not 0 < len(levels) <= MAX_LEVELS or min(levels) < 0 or max(levels) > 1:
        raise ValueError(f"Expected 1 to {MAX_LEVELS} sparsities in [0, 1] as `levels`, got {tuple(levels)}.")
    if not ascending and tuple(levels) != (0.0, 0.0):
        raise ValueError(f"Expected `levels` to ascend, got {tuple(levels)}.")


def check_group_size(n_inputs: int, group_size: int, name: str) -> None:
    """Raise a ValueError unless `group_size` divides the number of inputs."""
    if group_size < 1 or n_inputs % group_size:
        raise ValueError(
            f"Expected `group_size` to divide the number of inputs, got {group_size} for {n_inputs} "
            f"at {name}. Choose a divisor or protect this layer."
        )


def as_groups(
    score: Float[Tensor, "out in"], comparison: Comparison, group_size: int | None, name: str
) -> Float[Tensor, "groups size"]:
    """Scores with a row for each comparison group.

    Raises:
        ValueError: if `group_size` does not divide the number of inputs.
    """
    if group_size is not None:
        check_group_size(score.shape[1], group_size, name)
        return score.reshape(-1, group_size)
    return score if comparison == "output" else score.reshape(1, -1)


def _first_level_above(counts: Int[Tensor, "groups levels"], size: int) -> UInt8[Tensor, "groups size"]:
    """First level with more than p zeros, else `KEPT`, of each position p in ascending order of score."""
    positions = torch.arange(size).expand(counts.shape[0], size).contiguous()
    first = torch.searchsorted(counts.contiguous(), positions, right=True)
    first[first == counts.shape[1]] = KEPT
    return first.to(torch.uint8)


def check_sparsity(anatomy: Anatomy, sparsity: Mapping[str, float]) -> None:
    """Raise a ValueError unless these are projections of the model, each with a sparsity in [0, 1]."""
    known = {linear.name for linear in anatomy.linears}
    for name, value in sparsity.items():
        if name not in known:
            raise ValueError(f"Expected the name of a projection, got {name!r}. One is {min(known)!r}.")
        if not 0 <= value <= 1:
            raise ValueError(f"Expected `sparsity` in [0, 1], got {value} at {name}.")
