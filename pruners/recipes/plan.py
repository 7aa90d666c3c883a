"""Plan of a recipe for one model: the weights of each block, and exact costs of the whole."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from secateur.pruners.models.anatomy import Block
from secateur.pruners.models.cutting import Piece, pass_through, set_bias
from secateur.pruners.models.layout import BlockLayout
from secateur.pruners.models.live_experts import LiveExperts, live_part
from secateur.pruners.models.narrow import Narrow
from secateur.spaces.architecture.candidate import Kept, KeptUnits

DENSE = ""
"""The key of a block that is kept as it is."""


class LiveBlock:
    """A block of the live model, pruned by reference and restored: nothing is copied or written in place.

    Args:
        block: dense when this object is made.
        layout: of its units; None where nothing is cut.
    """

    def __init__(self, block: Block, layout: BlockLayout | None = None) -> None:
        self.block = block
        self._dense = [(parameter, parameter.data) for parameter in block.module.parameters()]
        self._biases = [(linear.module, linear.module.bias) for linear in block.linears]
        self.sublayers = {part.kind: live_part(part) for part in (layout.parts if layout else ())}
        self._vanishes = layout is None or layout.vanishes
        self._passing: list[RemovableHandle] = []

    def use(self, pieces: Mapping[str, Piece]) -> None:
        """Use these weights, of the dense shapes, and biases, where there are some, by the projection's full name."""
        for linear in self.block.linears:
            if linear.name in pieces:
                linear.point_to(pieces[linear.name].weight)
                set_bias(linear.module, pieces[linear.name].bias)

    def drop(self) -> None:
        """Make the block give what it gets."""
        for sublayer in self.sublayers.values():
            sublayer.remove()
        if not self._vanishes:
            self._passing.append(pass_through(self.block.module))

    def finish(self) -> None:
        """Give the block's parameters memory of their own; what it was pruned of is gone for good."""
        for sublayer in self.sublayers.values():
            if isinstance(sublayer, LiveExperts):
                sublayer.empty_others()
        for parameter in self.block.module.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def restore(self) -> None:
        """Make the block dense: the same tensors in the same parameters."""
        while self._passing:
            self._passing.pop().remove()
        for sublayer in self.sublayers.values():
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
        kept: numbers of units that each block keeps.
    """

    keys: tuple[str, ...]
    costs: Mapping[str, float]
    kept: tuple[Kept, ...]

    @abstractmethod
    def change(self, live: LiveBlock) -> None:
        """Prune a block, which is dense now and has another key than `DENSE`."""

    @property
    def sparsity(self) -> Mapping[str, float]:
        """Share of zeros of each projection by its full name; empty where units are cut off instead."""
        return {}

    @property
    def units(self) -> Sequence[KeptUnits]:
        """Units that each block keeps; empty where none are cut off."""
        return ()

    @property
    def narrow(self) -> Narrow | None:
        """Hidden channels that stay; None: all."""
        return None


def key_of(*parts: Any) -> str:
    """A key of these values, by their texts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
