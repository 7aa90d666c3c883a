"""Removal of blocks by position, from the last one down."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.models.anatomy import Anatomy


def position(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Reverse position of each block (Reassessing Layer Pruning, arXiv 2411.15558, reverse order)."""
    return tuple(float(-block.index) for block in anatomy.blocks)
