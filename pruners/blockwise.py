"""Pruning that goes block by block: what a streamed model is pruned by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.models.anatomy import Block
from secateur.spaces.method import Detail


@dataclass(frozen=True)
class BlockwisePruning:
    """Pruning of one block after the other, each from statistics at that block alone.

    Args:
        tokens: calibration windows.
        detail: statistics of inputs that it needs.
        sparsity: share of zeros asked of each projection, by its full name.
        prune: prunes a live block by reference. Gets the block, which is dense, and its statistics as
            `collected.packed_statistics` gives them; none if it needs none.
        sequential: statistics of a block come from already pruned blocks; otherwise from the dense model.
    """

    tokens: Int[Tensor, "windows length"]
    detail: Detail
    sparsity: Mapping[str, float]
    prune: Callable[[Block, dict[str, Tensor]], None]
    sequential: bool = False
