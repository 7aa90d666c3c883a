"""Prune a model in place to a plain configuration: a sparsity for each projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradients import model_statistics
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.masks import check_sparsity
from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.weights.method import Method


@torch.no_grad()
def prune(
    anatomy: Anatomy,
    sparsity: Mapping[str, float],
    method: Method,
    tokens: Int[Tensor, "windows length"],
    *,
    sequential: bool,
    on_block: Callable[[int], None] = lambda index: None,
) -> None:
    """Zero weights of the live model, block by block.

    Args:
        anatomy: the model; its weights are replaced by new tensors, never written in place.
        sparsity: by the projection's full name; a projection without an entry stays dense.
        method: how.
        tokens: calibration windows.
        sequential: statistics of a block come from already pruned blocks (as in the released Wanda and
            SparseGPT); otherwise from the dense model (as a level store must). Gradients are the dense model's
            either way: one pass before the first block is pruned.
        on_block: told the index of each block that is done.

    Raises:
        ValueError: on a name that the model does not have, or a sparsity outside [0, 1].
    """
    check_sparsity(anatomy, sparsity)
    whole = model_statistics(anatomy, tokens, gradients=method.gradients)
    for part in stream_blocks(anatomy, tokens, inputs=method.needs, sequential=sequential):
        _prune_block(part.block, part.inputs, sparsity, method, whole)
        on_block(part.block.index)


def _prune_block(
    block: Block,
    inputs: Mapping[str, InputStatistics],
    sparsity: Mapping[str, float],
    method: Method,
    whole: ModelStatistics,
) -> None:
    for linear in block.linears:
        wanted = sparsity.get(linear.name, 0.0)
        if wanted > 0:
            linear.point_to(method.weights(linear, inputs.get(linear.name), [wanted], whole)[0])
