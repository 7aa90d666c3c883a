"""Order of blocks by position: the last ones are dropped first."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.models.anatomy import Anatomy


def position(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """The last blocks are dropped first (Reassessing Layer Pruning, arXiv 2411.15558, reverse order)."""
    return tuple(float(-block.index) for block in anatomy.blocks)
