"""Angular distance: the window of blocks goes first that turns the last token least."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import stream_states
from secateur.pruners.depth.merge_targets import scores_from
from secateur.pruners.depth.streamline import nested_order
from secateur.pruners.models.anatomy import Anatomy


def by_angle(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Blocks in the order of windows of least angular distance at the last token.

    The Unreasonable Ineffectiveness of the Deeper Layers (Gromov et al. 2024, arXiv 2403.17887, eq. 6): of all windows
    of n blocks that with the least mean of ``arccos(cos(x_l, x_l+n)) / pi``, at the last token of each calibration
    window. There each n has its own window; here one order serves all budgets, as in `streamline.by_window`: the
    window is the paper's where a quarter of the blocks is removed, smaller ones lie within it and larger ones around
    it. Block 0 is kept. Healing by QLoRA is no part of this.
    """
    states = [x[:, -1] for x in stream_states(anatomy, tokens)]
    return scores_from(nested_order(-angles(states), replaced=False), len(anatomy.blocks))


def angles(states: Sequence[Float[Tensor, "windows width"]]) -> Float[Tensor, "borders borders"]:
    """Mean angular distance, in [0, 1], between the states at any two borders of blocks."""
    unit = torch.stack([F.normalize(x.double(), dim=-1) for x in states])
    cosines = torch.einsum("awd,bwd->abw", unit, unit).clamp(-1.0, 1.0)
    return (cosines.arccos() / math.pi).mean(-1)
