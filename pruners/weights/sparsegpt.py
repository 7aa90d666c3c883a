"""SparseGPT: pruned weights, and updates of the kept ones that change the layer's outputs least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruners.linalg import inverse_factor, stored_in
from secateur.pruners.masks import lowest
from secateur.pruners.weights.method import LayerProblem
from secateur.spaces.levels import n_zeros

_LAZY = 16
"""Columns that are updated one by one before the rest of the block is updated in one product."""


def sparsegpt(layer: LayerProblem, sparsities: Sequence[float]) -> Float[Tensor, "levels out in"]:
    """The weight at each sparsity, pruned and updated by blocked optimal brain surgery.

    Frantar and Alistarh 2023 (arXiv 2301.00774, algorithm 1). All sparsities are pruned together:
    they share the inverse and one loop. Differences from the paper: a block loses its share of the zeros
    exactly (cumulative rounding, so that the whole layer has ``n_zeros(sparsity, out * in)``), and inputs that
    are always zero are no special case: dampening keeps the matrix invertible. A row is free to lose more than
    others, as in the paper.

    Args:
        layer: with the Gram matrix of its inputs; computed in fp32. A group loses ``n_zeros(sparsity, group_size)``
            weights a row.
        sparsities: each in [0, 1].

    Returns:
        Weights in the dtype of the layer's, pruned entries exactly zero.

    Raises:
        ValueError: if `gram` is missing or not finite, or a size does not divide.
    """
    _check(layer)
    weight, block_size = layer.weight, layer.block_size
    n_in = weight.shape[1]
    upper = inverse_factor(layer.inputs, layer.dampening, layer.name)
    # Columns first, so that a column of all rows of all levels is one contiguous run.
    columns = weight.T.float()[:, None, :].repeat(1, len(sparsities), 1)
    for start in range(0, n_in, block_size):
        stop = min(start + block_size, n_in)
        errors = _prune_block(
            columns[start:stop], upper[start:stop, start:stop], sparsities, layer.group_size, start
        )
        if stop < n_in:
            rest = columns[stop:].reshape(n_in - stop, -1)
            rest.addmm_(upper[start:stop, stop:].T, errors.reshape(stop - start, -1), alpha=-1)
    return stored_in(columns.permute(1, 2, 0), weight.dtype)


def _prune_block(
    columns: Float[Tensor, "block levels out"],
    upper: Float[Tensor, "block block"],
    sparsities: Sequence[float],
    group_size: int | None,
    start: int,
) -> Float[Tensor, "block levels out"]:
    """Prune the columns in place, and return the errors to be spread over later columns."""
    size = columns.shape[0]
    errors = torch.empty_like(columns)
    scale = upper.diagonal()
    pruned = _block_mask(columns, scale, sparsities, start) if group_size is None else None
    for begin in range(0, size, group_size or _LAZY):
        end = min(begin + (group_size or _LAZY), size)
        if group_size is None:
            assert pruned is not None
            gone = pruned[begin:end]
        else:
            gone = _group_mask(columns[begin:end], scale[begin:end], sparsities)
        for j in range(begin, end):
            column = columns[j]
            removed = column * gone[j - begin]
            errors[j] = removed / scale[j]
            column -= removed
            if j + 1 < end:
                # Only within the run; the mask was chosen before, so entries to be pruned may still change.
                columns[j + 1 : end] -= upper[j, j + 1 : end, None, None] * errors[j]
        if end < size:
            rest = columns[end:].reshape(size - end, -1)
            rest.addmm_(upper[begin:end, end:].T, errors[begin:end].reshape(end - begin, -1), alpha=-1)
    return errors


def _block_mask(
    columns: Float[Tensor, "block levels out"],
    scale: Float[Tensor, " block"],
    sparsities: Sequence[float],
    start: int,
) -> Bool[Tensor, "block levels out"]:
    """True where pruned: the block's share of each level's zeros, the smallest ``(w / U_jj)^2`` (eq. 3)."""
    size, n_levels, n_out = columns.shape
    score = (columns / scale[:, None, None]).square().permute(1, 2, 0).reshape(n_levels, -1)
    gone = torch.empty_like(score, dtype=torch.bool)
    for level, sparsity in enumerate(sparsities):
        count = n_zeros(sparsity, n_out * (start + size)) - n_zeros(sparsity, n_out * start)
        gone[level] = lowest(score[level], count)
    return gone.reshape(n_levels, n_out, size).permute(2, 0, 1).contiguous()


def _group_mask(
    columns: Float[Tensor, "group levels out"], scale: Float[Tensor, " group"], sparsities: Sequence[float]
) -> Bool[Tensor, "group levels out"]:
    """True where pruned: each row of each level loses its number in this group."""
    score = (columns / scale[:, None, None]).square().permute(1, 2, 0)
    counts = [n_zeros(sparsity, score.shape[-1]) for sparsity in sparsities]
    gone = torch.stack([lowest(score[level], count) for level, count in enumerate(counts)])
    return gone.permute(2, 0, 1).contiguous()


def _check(layer: LayerProblem) -> None:
    n_in, group_size = layer.weight.shape[1], layer.group_size
    if layer.inputs.gram is None:
        raise ValueError(f"Expected the Gram matrix of the inputs, got moments only at {layer.name}.")
    if group_size is not None and (n_in % group_size or layer.block_size % group_size):
        raise ValueError(
            f"Expected `group_size` to divide the number of inputs and `block_size`, got {group_size} for "
            f"{n_in} inputs and blocks of {layer.block_size} at {layer.name}."
        )
