"""Units that a reconstruction of structure chose by itself, with the weights that it gave them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from secateur.pruners.models.narrow import Narrow
from secateur.pruners.structure.kprune import KeptNumbers


class ChosenUnits(NamedTuple):
    """Units that stay, and new weights.

    Args:
        numbers: kept units of each block; none in both sub-layers: the block goes.
        weights: of projections by their full names, ``out in``, cut to the kept units.
        narrow: hidden channels that stay; None: all.
    """

    numbers: tuple[KeptNumbers, ...]
    weights: Mapping[str, Tensor]
    narrow: Narrow | None = None
