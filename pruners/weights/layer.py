"""Layer that a reconstruction of weights works on."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.masks import Comparison


@dataclass(frozen=True)
class Layer:
    """Inputs of a reconstruction.

    Args:
        weight: dense.
        inputs: with the statistics that the method needs.
        comparison: who competes with whom; None: as the method has it.
        group_size: of patterns; None: none.
        damp: added to the second moment's diagonal, as a fraction of its mean.
        block_size: columns that are pruned together, where the method has that.
        name: for errors.
    """

    weight: Float[Tensor, "out in"]
    inputs: InputStatistics
    comparison: Comparison | None
    group_size: int | None
    damp: float
    block_size: int
    name: str
