"""Plan of a recipe for one model: the weights of each block, and exact costs of the whole."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.pruners.models.anatomy import Block, Sublayer
from secateur.pruners.models.cutting import LiveSublayer, Piece, set_bias
from secateur.pruners.models.layout import BlockLayout
from secateur.spaces.architecture.candidate import Kept, KeptUnits

DENSE = ""
"""The key of a block that is kept as it is."""


class LiveBlock:
    """Remembers what the block was when this object was made; that must be the dense one.

    Nothing is copied or written in place: parameters are pointed to other tensors.

    Args:
        block: of the live model.
        layout: where its units are; None where nothing is cut.
    """

    def __init__(self, block: Block, layout: BlockLayout | None = None) -> None:
        self.block = block
        self._layout = layout
        self._dense = [(parameter, parameter.data) for parameter in block.module.parameters()]
        self._biases = [(linear.module, linear.module.bias) for linear in block.linears]
        parts = () if layout is None else layout.sublayers
        self._sublayers = {part.kind: LiveSublayer(part) for part in parts}

    @property
    def layout(self) -> BlockLayout:
        """Where its units are."""
        assert self._layout is not None, "made with one where units or blocks go"
        return self._layout

    def cut(self, kind: Sublayer, n_kept: int, pieces: Mapping[str, Piece]) -> None:
        """Use these weights of a sub-layer, which has so many units (> 0) then."""
        self._sublayers[kind].cut(n_kept, pieces)

    def remove(self, kind: Sublayer) -> None:
        """Make a sub-layer a zero."""
        self._sublayers[kind].remove()

    def use(self, pieces: Mapping[str, Piece]) -> None:
        """Use these weights, of the dense shapes, and biases, where there are some, by the projection's full name."""
        for linear in self.block.linears:
            if linear.name in pieces:
                linear.point_to(pieces[linear.name].weight)
                set_bias(linear.module, pieces[linear.name].bias)

    def restore(self) -> None:
        """As it was: the same tensors in the same parameters."""
        for sublayer in self._sublayers.values():
            sublayer.restore()
        for parameter, data in self._dense:
            parameter.data = data
        for module, bias in self._biases:
            module.bias = bias


@dataclass(frozen=True)
class PruningPlan(ABC):
    """Plan of a recipe, made from the dense model; its blocks can be pruned one by one, in any order.

    Args:
        keys: one a block; equal keys, of any plans over the same calibration texts, are equal weights.
        costs: exact counts by their names, as spaces have them.
    """

    keys: tuple[str, ...]
    costs: Mapping[str, float]

    @abstractmethod
    def change(self, live: LiveBlock) -> None:
        """Prune a block, which is dense now and has another key than `DENSE`."""

    @property
    def sparsity(self) -> Mapping[str, float]:
        """Share of zeros of each projection by its full name; empty where nothing is left in place."""
        return {}

    @property
    @abstractmethod
    def kept(self) -> Sequence[Kept]:
        """Numbers of units that each block keeps."""

    @property
    def units(self) -> Sequence[KeptUnits]:
        """Units that each block keeps; empty where none are cut off."""
        return ()


def key_of(*parts: Any) -> str:
    """A key of these values, by their texts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
