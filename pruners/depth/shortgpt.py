"""ShortGPT: removal of blocks by influence, the angle between their input and output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.models.anatomy import Anatomy


def shortgpt(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Influence of each block (Men et al. 2024, arXiv 2403.03853), collected by the walk over the blocks."""
    assert len(whole.influence) == len(anatomy.blocks), "collected where the table says that it is needed"
    return whole.influence


def block_influence(
    before: Sequence[Float[Tensor, "batch length width"]],
    after: Sequence[Float[Tensor, "batch length width"]],
) -> float:
    """Mean over tokens of one minus the cosine between a block's input and its output (eq. 1)."""
    turned = [
        1 - F.cosine_similarity(x.double(), y.double(), dim=-1) for x, y in zip(before, after, strict=True)
    ]
    return float(torch.cat(turned).mean())
